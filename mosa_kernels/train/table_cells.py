"""One cell of a grid: a run, its measurement, and the JSON file that says it is done."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosa_kernels._machine import machine
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.peft.styles import STYLES
from mosa_kernels.train.counts import parameter_counts
from mosa_kernels.train.evaluate import MECHANISMS, evaluate, number_of_experts
from mosa_kernels.train.folder import read_json, versions, write_json
from mosa_kernels.train.loop import NonFiniteError, Trainer, require_finite
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import FREE, Settings
from mosa_kernels.train.setup import device_name, make_accelerator, make_trainer, native_size, open_splits, prepare


@dataclass(frozen=True)
class Cell:
    """A run of a grid.

    Attributes:
        label: what it is, in a few words; not part of its identity.
        settings: everything that decides its numbers.
        test: measure on the test images; else on the validation images, to choose with.
        mechanisms: of inference, some of `MECHANISMS`.
    """

    label: str
    settings: Settings
    test: bool
    mechanisms: tuple[str, ...] = ("merged",)

    @property
    def identity(self) -> str:
        """A hash of what decides its numbers: tables that need the same run share it."""
        record = {key: value for key, value in self.settings.as_dict().items() if key not in FREE | {"cpu"}}
        record["recipe"].pop("inference")
        # As before there were such numbers: what is done stays done.
        if record["recipe"]["expert_lr"] == 1.0:
            del record["recipe"]["expert_lr"]
        if record["label_noise"] == 0.0:
            del record["label_noise"]
        adapter = record["adapter"]
        if (
            adapter["style"] in STYLES and adapter["scale"] == STYLES[adapter["style"]].scale
        ):  # said or left to the style
            adapter["scale"] = None
        text = json.dumps({"settings": record, "test": self.test}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, folder: Path) -> Path:
        """Its file."""
        readable = re.sub(r"[^a-z0-9]+", "-", self.label.lower()).strip("-")
        return folder / f"{readable[:80]}-{self.identity}.json"


def find_result(cell: Cell, folder: Path) -> dict[str, Any] | None:
    """The result of a cell that is done, by whatever label; None where it, or one of its mechanisms, is not."""
    for path in sorted(folder.glob(f"*-{cell.identity}.json")):
        result = read_json(path)
        measured = result.get("measured", {})
        covered = all(name in result["mechanisms"] for name in cell.mechanisms)
        if result.get("failed") or covered or "plain" in measured:
            return result
    return None


DATA = ("data", "data_root", "download", "data_seed", "labels_per_class", "label_noise")


@functools.lru_cache(maxsize=6)
def _splits(settings: Settings, size: int) -> DataSplits:
    return open_splits(settings, size)


def data_settings(settings: Settings) -> Settings:
    """What the settings say of the data alone."""
    return Settings(model="", **{name: getattr(settings, name) for name in DATA})


def splits_of(settings: Settings) -> DataSplits:
    """The data of a run, opened once a process."""
    return _splits(data_settings(settings), native_size(settings))


def run_cell(
    cell: Cell, reporter: Reporter | None = None, arrange: Callable[[Trainer], None] | None = None
) -> dict[str, Any]:
    """Trains, measures once at the end, and returns the result, ready for JSON.

    Args:
        cell: the run.
        reporter: shows what happens.
        arrange: changes the trainer before it begins, for what settings cannot say.

    A run whose loss or outputs leave the finite numbers is a result, too: {"failed": why}.
    """
    settings = cell.settings
    accelerator = make_accelerator(settings)
    prepared = prepare(settings, accelerator.num_processes, splits_of(settings))
    counts = parameter_counts(prepared.model)
    trainer = make_trainer(settings, prepared, accelerator, reporter or Reporter())
    trainer.validate = False
    if arrange is not None:
        arrange(trainer)
    began = time.perf_counter()
    common = {
        "label": cell.label,
        "settings": settings.as_dict(),
        "on": "test" if cell.test else "validation",
        "mechanisms": list(cell.mechanisms),
        "parameters": counts,
        "data": prepared.splits.summary(),
        "normalisation": prepared.normalisation,
        "backbone": prepared.backbone,
        "machine": machine(),
        "device": device_name(accelerator.device),
        "versions": versions(),
    }
    recipe = settings.recipe
    try:
        trainer.fit()
        trained = time.perf_counter() - began
        measured = evaluate(
            trainer.runner,
            trainer.test_loader if cell.test else trainer.validation_loader,
            cell.mechanisms,
            rules=MERGE_RULES if cell.test else (recipe.merge_rule,),
            seed=recipe.seed,
            accelerator=accelerator,
        )
        images = "test" if cell.test else "validation"
        require_finite(next(iter(measured.values()))["nll"], images, recipe.epochs, recipe.lr)
    except NonFiniteError as error:
        return {**common, "failed": str(error), "seconds": time.perf_counter() - began}
    return {
        **common,
        "experts": number_of_experts(trainer.runner),
        "measured": measured,
        "seconds_training": trained,
        "seconds": time.perf_counter() - began,
    }


def run_and_keep(cell: Cell, folder: Path) -> dict[str, Any]:
    """Runs a cell and writes its file, complete or not at all."""
    result = run_cell(cell)
    write_json(cell.path(folder), result)
    return result


def accuracy_of(result: dict[str, Any], mechanism: str | None = None) -> float | None:
    """Percent by a mechanism (None: merged as the recipe says), or None of a run that failed."""
    if result.get("failed"):
        return None
    measured = result["measured"]
    name = "plain" if "plain" in measured else mechanism or result["settings"]["recipe"]["merge_rule"]
    value: float = measured[name]["accuracy"]
    return value


def mechanisms_for(name: str | None) -> tuple[str, ...]:
    """What a cell has to measure so that a row can show this mechanism."""
    if name in (None, "mean", "jigsaw"):
        return ("merged", "stochastic")
    assert name in MECHANISMS
    return ("merged", "stochastic", str(name))
