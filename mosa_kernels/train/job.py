"""A whole run: prepare, train with a folder that survives crashes, choose on validation, test once."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mosa_kernels.data.classes import differing_classes
from mosa_kernels.train import state as training_state
from mosa_kernels.train.counts import parameter_counts
from mosa_kernels.train.evaluate import evaluate, number_of_experts, warn_of_merge_loss
from mosa_kernels.train.folder import (
    TRANSFORMS,
    RunFolder,
    SettingsDifferError,
    read_json,
    require_same,
    require_writable,
    versions,
    write_json,
)
from mosa_kernels.train.keeping import copy_trained, load_trained, save_trained
from mosa_kernels.train.loop import Row, Trainer, require_finite
from mosa_kernels.train.plots import plot_curve
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.setup import Prepared, device_name, make_accelerator, make_trainer, prepare, seed_everything

SELECTION = {
    "best": "weights of the epoch with the highest validation accuracy, the earliest of equals; test touched once",
    "last": "weights of the last epoch; test touched once",
}
RANK_STRIDE = 1_000_003  # apart enough that seeds of runs and seeds of processes do not meet
PLOT_EVERY = 30.0  # seconds: a picture takes as long as an epoch of a small task


@dataclass
class Job:
    """One run in its folder.

    Args:
        settings: what to do.
        output: the run's folder.
        resume: go on with the run that is in the folder.
        reporter: shows what happens.

    Raises:
        RunExistsError: the folder holds a run and `resume` is False, or another process is at work in it.
        SettingsDifferError: `resume` with other settings, data or weights than the run began with.
    """

    settings: Settings
    output: Path
    resume: bool
    reporter: Reporter

    def __post_init__(self) -> None:
        require_writable(self.output, folder=True)
        self.folder = RunFolder(self.output)
        if self.resume:
            stored = self.folder.read_config()
            require_same(Settings.from_dict(stored["settings"]).flat(), self.settings.flat(), "settings")
        elif self.output.exists():
            self.folder.require_new()
        self.accelerator: Accelerator = make_accelerator(self.settings)
        self.prepared: Prepared = prepare(self.settings, self.accelerator.num_processes)
        if not self.accelerator.is_main_process:
            self.reporter = Reporter()
            # Every process began with the same weights; experts and dropout are each one's own.
            seed_everything(self.settings.recipe.seed + RANK_STRIDE * self.accelerator.process_index)
        self.parameters = parameter_counts(self.prepared.model)
        self.rows: list[Row] = []
        self._plotted = time.monotonic()
        self.trainer: Trainer = make_trainer(self.settings, self.prepared, self.accelerator, self.reporter)
        config = self._config()
        if self.resume:
            stored = self.folder.read_config()
            self._require_classes(stored["data"])
            for what in ("backbone", "data"):
                require_same(_comparable(stored[what]), _comparable(_plain(config[what])), what)
            # Before there was such an entry, runs recorded the model's own resizing whether it was used or not.
            sure = None if TRANSFORMS in stored else ("input_size", "mean", "std")
            before, now = (_comparable(_plain(record["normalisation"])) for record in (stored, config))
            require_same(_only(before, sure), _only(now, sure), "normalisation")
            before, now = ({"processes": record["processes"]} for record in (stored, config))
            require_same(before, now, "number of processes")
            self._warn_of_versions(stored["versions"], config["versions"])
            with self._alone():
                self._restore()
        elif self.accelerator.is_main_process:
            with self._alone():
                self.folder.begin(config)

    def run(self) -> dict[str, Any]:
        """Trains what is left, tests once, and returns the content of result.json.

        Raises:
            RunExistsError: another process is at work in the folder.
            NonFiniteError: the loss, or what the model says, is not finite any more; the state of the last good epoch
                stays in the folder.
            KeyboardInterrupt: as the user wished; the state of the last complete epoch stays in the folder.
        """
        if self.folder.result.is_file():
            try:
                return read_json(self.folder.result)
            except ValueError as error:
                self.reporter.message(f"warning: {error}: damaged; the chosen weights are tested again")
        with self._alone():
            if self.trainer.progress.epochs_done < self.settings.recipe.epochs:
                self._fit()
            self._plot()  # of epochs that are done, a kill may have come before it
            return self._test()

    def _fit(self) -> None:
        try:
            self.trainer.fit(self._save_epoch)
        except BaseException:
            with suppress(Exception):  # what ended the run, as a full disk, may forbid the picture, too
                self._plot()
            raise

    def _alone(self) -> AbstractContextManager[None]:
        """The main process keeps other runs out; the others write only when it waits for them."""
        return self.folder.alone() if self.accelerator.is_main_process else nullcontext()

    def _config(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "settings": settings.as_dict(),
            "lr": settings.recipe.lr,
            "selection": SELECTION[settings.recipe.select],
            "backbone": self.prepared.backbone,
            "data": self.prepared.splits.summary(),
            "normalisation": self.prepared.normalisation,
            TRANSFORMS: self.prepared.transforms,
            "adapter": self.prepared.adapter,
            "augmentations": self.prepared.augmentations,
            "parameters": self.parameters,
            "device": self.device,
            "processes": self.accelerator.num_processes,
            "versions": versions(),
            "command": sys.argv[1:],
        }

    @property
    def device(self) -> str:
        """What the run computes on, in words."""
        name = device_name(self.accelerator.device)
        return f"cpu ({torch.get_num_threads()} threads)" if name == "cpu" else name

    def _require_classes(self, stored: dict[str, Any]) -> None:
        splits, names = self.prepared.splits, stored.get("class_names")
        if names is None:
            self.reporter.message("note: the run does not name its classes, so that their names were not compared")
        elif len(names) == splits.num_classes and (difference := differing_classes(names, splits.classes)):
            raise SettingsDifferError(f"resume: {splits.name} has other classes than the run began with: {difference}")

    def _warn_of_versions(self, before: dict[str, str], now: dict[str, str]) -> None:
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            self.reporter.message(f"note: versions have changed since the run began: {', '.join(changed)}")

    @property
    def epochs_kept(self) -> int:
        """How many epochs are complete, with a state in the folder to go on from."""
        return next((done for done, _ in training_state.published(self.folder.state)), 0)

    def _part(self, process: int | None = None) -> str:
        return f"process-{self.accelerator.process_index if process is None else process}"

    def _save_epoch(self, row: Row) -> None:
        """Metrics, then the state, then the adapters: what a crash leaves half done is mended on resuming."""
        accelerator, folder, epoch = self.accelerator, self.folder, row["epoch"]
        partial = training_state.unfinished(folder.state, epoch)
        if accelerator.is_main_process:
            folder.append(row)
            self.rows.append(row)
            shutil.rmtree(partial, ignore_errors=True)
            training_state.write_part(partial, "run", self.trainer.state())
        accelerator.wait_for_everyone()
        training_state.write_part(partial, self._part(), {"generators": training_state.random_state()})
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            training_state.publish(folder.state, epoch)
            self._save_adapters()
            if time.monotonic() - self._plotted > PLOT_EVERY:
                self._plot()
        accelerator.wait_for_everyone()

    def _plot(self) -> None:
        if self.accelerator.is_main_process:
            plot_curve(self.rows, self.folder.curve, self.title)
        self._plotted = time.monotonic()

    def _save_adapters(self) -> None:
        save_trained(self.prepared.model, self.folder.last, self.prepared.splits.classes)
        if self.trainer.progress.best_epoch == self.trainer.progress.epochs_done:
            copy_trained(self.folder.last, self.folder.best)

    def _restore(self) -> None:
        # All processes read all parts, so that they agree on what is damaged.
        parts = ["run", *(self._part(process) for process in range(self.accelerator.num_processes))]
        done, found = training_state.read_newest(self.folder.state, parts, self.reporter.message)
        if done:
            self.trainer.load_state(found["run"], found[self._part()]["generators"])
        if self.accelerator.is_main_process:
            self.rows = self.folder.forget_after(done)
            if done:
                self._save_adapters()
        self.accelerator.wait_for_everyone()

    @property
    def title(self) -> str:
        """The run in a few words."""
        s = self.settings
        return f"{s.method} on {s.data}, {s.model}, recipe {s.recipe.name}, lr {s.recipe.lr:g}, seed {s.recipe.seed}"

    def _test(self) -> dict[str, Any]:
        settings, recipe, progress = self.settings, self.settings.recipe, self.trainer.progress
        chosen = progress.best_epoch if recipe.select == "best" else progress.epochs_done
        weights = self.folder.best if recipe.select == "best" else self.folder.last
        load_trained(self.prepared.model, weights)
        runner, accelerator = self.trainer.runner, self.accelerator
        mechanisms = dict.fromkeys(("merged", "stochastic", recipe.inference))
        validation, test = (
            evaluate(runner, loader, mechanisms, accelerator=accelerator, seed=recipe.seed)
            for loader in (self.trainer.validation_loader, self.trainer.test_loader)
        )
        reported = recipe.reported if number_of_experts(runner) > 1 else "plain"
        require_finite(test[reported]["nll"], "test", chosen, recipe.lr)
        warning = warn_of_merge_loss(test, recipe.merge_rule)
        if warning is not None:
            self.reporter.message(f"warning: {warning}")
        result = {
            "method": settings.method,
            "model": settings.model,
            "data": self.prepared.splits.name,
            "class_names": list(self.prepared.splits.classes),
            "recipe": recipe.name,
            "lr": recipe.lr,
            "seed": recipe.seed,
            "selection": SELECTION[recipe.select],
            "epoch": chosen,
            "reported": reported,
            "accuracy": test[reported]["accuracy"],
            "nll": test[reported]["nll"],
            "test": test,
            "validation": validation,
            "warning": warning,
            "parameters": self.parameters,
            "seconds": progress.seconds,
            "normalisation": self.prepared.normalisation,
            "data_format": self.prepared.splits.note,
            "data_differs_from_table_11": list(self.prepared.splits.differs),
            "data_fingerprint": self.prepared.splits.fingerprint,
            "backbone_sha256": self.prepared.backbone["sha256"],
            "device": self.device,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "versions": versions(),
        }
        if accelerator.is_main_process:
            write_json(self.folder.result, result)
        return result


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _only(record: dict[str, Any], names: Collection[str] | None) -> dict[str, Any]:
    """Some entries of a record; None: all."""
    return {key: value for key, value in record.items() if names is None or key in names}


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """In one level, without the class names, which `_require_classes` compares."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "class_names"}
