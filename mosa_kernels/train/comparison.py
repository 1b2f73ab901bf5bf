"""Several methods on the same data and seeds, by the one training loop: what `mosa-kernels demo` shows.

Each contender's learning rate, scale and dropout were chosen beforehand on validation data of other seeds by
`scripts/tune_demo.py`; `assets/demo_settings.json` holds the choice, the grids, what was tried outside them, and what
has to be said of how the choice came about.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.train.counts import parameter_counts
from mosa_kernels.train.evaluate import MECHANISMS, evaluate
from mosa_kernels.train.keeping import save_trained
from mosa_kernels.train.loop import Row, require_finite
from mosa_kernels.train.merging import check_merge, merged_card, merged_copy, write_merged
from mosa_kernels.train.methods import AdapterOptions, find_method, split_numbers
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.recipe import Recipe
from mosa_kernels.train.settings import INITIAL_SEED, Settings
from mosa_kernels.train.setup import make_accelerator, make_trainer, open_splits, prepare

MODEL, DATA, IMAGE_SIZE, LABELS_PER_CLASS = OFFLINE_BACKBONE, "offline:digits", 32, 20
CHOSEN = Path(__file__).resolve().parent.parent / "assets" / "demo_settings.json"
# 200 images in batches of 40: 200 updates, the first tenth of them warming up. One cosine, no crop, no early stop.
DEMO = Recipe(
    name="demo",
    lr_scaled=False,
    epochs=40,
    warmup_epochs=4,
    batch_size=40,
    augment="none",
    select="last",
)


@dataclass(frozen=True)
class Contender:
    """A method in the comparison.

    Attributes:
        key: in files.
        title: for people.
        method, passes, overrides: as in `Settings` and `Recipe`.
        adapter: what differs from the adapter of the others, by field of `AdapterOptions`.
        tuned: which numbers of recipe and adapter were chosen on validation data.
    """

    key: str
    title: str
    method: str
    passes: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    tuned: tuple[str, ...] = ("base_lr", "scale")
    adapter: dict[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender("linear", "linear probing", "linear", tuned=("base_lr",)),
    Contender("adaptformer", "AdaptFormer", "adaptformer"),
    Contender("dropout", "AdaptFormer + dropout", "adaptformer", tuned=("base_lr", "scale", "dropout")),
    Contender(
        "dropout-two-pass",
        "AdaptFormer + dropout, two passes + KL",
        "adaptformer",
        passes=2,
        overrides={"align": "none", "beta": 0.0},
        tuned=("base_lr", "scale", "dropout"),
    ),
    Contender("mosa-batch", "MoSA, expert per batch (paper)", "mosa", 2, {"expert_per": "batch"}),
    # Without alignment, as the control with dropout: it costs accuracy here (63.7 against 65.9 % at lr 0.03, one seed).
    Contender(
        "mosa-rising",
        "MoSA, 1 to 4 experts with depth x N",
        "mosa",
        2,
        {"expert_per": "sample", "align": "none", "beta": 0.0},
        adapter={"num_experts": "1:4", "expert_scale": "N"},
    ),
    Contender(
        "mosa-anchored",
        "MoSA, anchored, one of two per sample x N",
        "mosa",
        2,
        {"expert_per": "sample", "align": "none", "beta": 0.0},
        adapter={"num_experts": 2, "expert_scale": "N", "anchored": True},
    ),
)


@dataclass
class Outcome:
    """One contender at one seed.

    Attributes:
        measured: by mechanism, accuracy (percent) and negative log-likelihood (nats), see `evaluate`.
        reported: the mechanism that counts as the contender's accuracy.
        trained: parameters that training moves, the head included.
        stored: parameters to keep for inference once the adapters are merged, the head included.
        seconds: of training.
        rows: the training curve, a row an epoch.
        merge: what `MergeCheck` found, for a tested MoSA.
    """

    contender: Contender
    seed: int
    measured: dict[str, dict[str, float]]
    reported: str
    trained: int
    stored: int
    seconds: float
    rows: list[Row]
    merge: dict[str, Any] | None

    @property
    def accuracy(self) -> float:
        return self.measured[self.reported]["accuracy"]

    @property
    def nll(self) -> float:
        return self.measured[self.reported]["nll"]


def chosen_numbers(path: Path = CHOSEN) -> dict[str, dict[str, float]]:
    """The tuned numbers of each contender, by key.

    Raises:
        FileNotFoundError: the record is missing from the installation.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the record of the demo's settings is missing: reinstall the package")
    record: dict[str, dict[str, float]] = json.loads(path.read_text())["chosen"]
    return record


def demo_settings(contender: Contender, numbers: dict[str, float], seed: int, epochs: int | None = None) -> Settings:
    """The settings of one run.

    Args:
        contender: the method.
        numbers: its tuned numbers.
        seed: of the data; all else is drawn from `seed + INITIAL_SEED`.
        epochs: fewer than the demo's, for a quick look.
    """
    adapter, rest = split_numbers(numbers)
    changes: dict[str, Any] = {**contender.overrides, **rest, "seed": seed + INITIAL_SEED}
    recipe = dataclasses.replace(DEMO, **changes)
    if epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=epochs, warmup_epochs=epochs / 10)
    return Settings(
        model=MODEL,
        data=DATA,
        data_seed=seed,
        labels_per_class=LABELS_PER_CLASS,
        method=contender.method,
        adapter=AdapterOptions(**{"bottleneck": 64, "num_experts": 4, **contender.adapter, **adapter}),
        passes=contender.passes,
        recipe=recipe,
    )


def demo_splits(seed: int) -> DataSplits:
    """The demo's data: 20 labels a class, 1000 validation and 3000 test images."""
    settings = Settings(model=MODEL, data=DATA, data_seed=seed, labels_per_class=LABELS_PER_CLASS)
    return open_splits(settings, IMAGE_SIZE)


def run_contender(
    contender: Contender,
    settings: Settings,
    splits: DataSplits,
    *,
    test: bool,
    reporter: Reporter | None = None,
    keep_in: str | None = None,
) -> Outcome:
    """Trains one contender and measures it once, at the end.

    Args:
        contender: for the record.
        settings: from `demo_settings`.
        splits: from `demo_splits`.
        test: measure on test images, by every mechanism, and check the merge; else on validation images, merged only.
        reporter: shows what happens.
        keep_in: a folder for the adapter and the merged weights, or None; not for linear probing.

    Raises:
        NonFiniteError: the loss or the outputs are not finite any more.
    """
    accelerator = make_accelerator(settings)
    prepared = prepare(settings, accelerator.num_processes, splits)
    counts = parameter_counts(prepared.model)
    trainer = make_trainer(settings, prepared, accelerator, reporter or Reporter())
    trainer.validate = False
    began = time.perf_counter()
    rows = trainer.fit()
    seconds = time.perf_counter() - began
    rule = settings.recipe.merge_rule
    loader = trainer.test_loader if test else trainer.validation_loader
    measured = evaluate(
        trainer.runner,
        loader,
        MECHANISMS if test else ("merged",),
        rules=MERGE_RULES if test else (rule,),
        seed=settings.recipe.seed,
        accelerator=accelerator,
    )
    reported = rule if "plain" not in measured else "plain"
    require_finite(measured[reported]["nll"], "test" if test else "validation", len(rows), settings.recipe.lr)
    merged, check = prepared.model, None
    if find_method(contender.method).mode is not None:
        merged = merged_copy(prepared.model, rule)
        if test and contender.method == "mosa":
            check = check_merge(prepared.model, merged, loader, rule)
    if keep_in is not None:
        save_trained(prepared.model, Path(keep_in) / "adapter", splits.classes)
        card = merged_card(prepared.model, settings, splits.num_classes, rule, check, splits.classes)
        write_merged(merged, Path(keep_in) / "merged.safetensors", card)
    return Outcome(
        contender=contender,
        seed=settings.data_seed,
        measured=measured,
        reported=reported,
        trained=counts["trained"],
        stored=sum(p.numel() for p in merged.parameters()) - counts["backbone"],
        seconds=seconds,
        rows=rows,
        merge=None if check is None else check.as_dict(),
    )
