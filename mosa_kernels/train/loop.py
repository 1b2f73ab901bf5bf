"""The training loop: epochs of updates, each followed by a validation, on accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.layers import DropPath
from torch import Tensor, nn

from mosa_kernels.data.loaders import Loaders, set_epoch
from mosa_kernels.train.evaluate import predict
from mosa_kernels.train.objective import Objective
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.recipe import Recipe
from mosa_kernels.train.schedule import Schedule
from mosa_kernels.train.state import load_trained_state, set_random_state, trained_state

Row = dict[str, Any]
CHECK_EVERY = 10  # updates between two looks at the loss, each of which waits for the device
# Of the frozen backbone, these stay in evaluation mode: nothing in it is random, and no statistics move.
QUIET = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, DropPath, nn.modules.batchnorm._BatchNorm)


class NonFiniteError(FloatingPointError):
    """The loss, a trained weight or what the model says is not a finite number."""


def require_finite(nll: float, images: str, epoch: int, lr: float) -> None:
    """Raises a NonFiniteError where a model's outputs on such images are not finite: their argmax says nothing."""
    if not math.isfinite(nll):
        raise NonFiniteError(
            f"outputs for {images} images are not finite after epoch {epoch}: try a lower learning rate (now {lr:g}) "
            "or --clip-norm 1"
        )


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epochs_done: complete epochs.
        best_epoch, best_accuracy: the earliest epoch (from 1) of the highest validation accuracy, in percent.
        seconds: spent in complete epochs.
    """

    epochs_done: int = 0
    best_epoch: int = 0
    best_accuracy: float = -1.0
    seconds: float = 0.0


@dataclass
class Trainer:
    """Trains a model's adapters and head in place.

    Args:
        model: with its adapters, the backbone frozen.
        objective: the loss of a batch.
        optimizer: of the trainable parameters, with the peak learning rate.
        loaders: of the data.
        recipe: length and schedule.
        accelerator: places the model and chooses the precision; `gradient_accumulation_steps` is respected.
        reporter: shows what happens.
        compile_model: have torch.compile make graphs of the model.
        validate: whether to measure the validation accuracy after each epoch.
    """

    model: nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    loaders: Loaders
    recipe: Recipe
    accelerator: Accelerator
    reporter: Reporter = field(default_factory=Reporter)
    compile_model: bool = False
    validate: bool = True

    def __post_init__(self) -> None:
        self.progress = Progress()
        prepare = self.accelerator.prepare
        if self.compile_model:
            self.model.compile()
        self.runner, self._optimizer = prepare(self.model, self.optimizer)
        self.train_loader, self.validation_loader, self.test_loader = prepare(
            self.loaders.train, self.loaders.validation, self.loaders.test
        )
        accumulated = self.accelerator.gradient_accumulation_steps
        self.updates_per_epoch = math.ceil(len(self.train_loader) / accumulated)
        self.schedule = Schedule(self.optimizer, self.recipe, self.updates_per_epoch)

    def fit(self, on_epoch: Callable[[Row], None] | None = None) -> list[Row]:
        """Runs the epochs that are left; returns their rows.

        Args:
            on_epoch: called with the row of each epoch once it is complete.

        Raises:
            NonFiniteError: the loss, a weight or an output on validation images is not finite any more; `on_epoch` was
                not called for that epoch.
        """
        rows = []
        per_epoch = self.updates_per_epoch
        self.reporter.start(self.recipe.epochs * per_epoch, self.progress.epochs_done * per_epoch)
        try:
            for epoch in range(self.progress.epochs_done, self.recipe.epochs):
                rows.append(self._epoch(epoch))
                if on_epoch is not None:
                    on_epoch(rows[-1])
                self.reporter.epoch(rows[-1])
        finally:
            self.reporter.stop()
        return rows

    def _epoch(self, epoch: int) -> Row:
        began = time.perf_counter()
        row = self._train(epoch)
        self._require_finite_weights(epoch)
        done = self.progress
        if self.validate:
            validation = predict(self.runner, self.validation_loader, self.accelerator)
            require_finite(validation.nll, "validation", epoch + 1, self.recipe.lr)
            row |= {"validation_accuracy": validation.accuracy, "validation_nll": validation.nll}
            if validation.accuracy > done.best_accuracy:
                done.best_epoch, done.best_accuracy = epoch + 1, validation.accuracy
        row["seconds"] = time.perf_counter() - began
        done.epochs_done = epoch + 1
        done.seconds += row["seconds"]
        return row

    def _train(self, epoch: int) -> Row:
        accelerator, optimizer = self.accelerator, self._optimizer
        training_mode(self.runner)
        set_epoch(self.train_loader, epoch)
        totals: dict[str, Tensor] = {}
        right = torch.zeros((), device=accelerator.device)
        images_seen, update = 0, epoch * self.updates_per_epoch
        gathered: list[int] = []  # sizes of the batches of this update
        began = time.perf_counter()
        for batch, (images, labels) in enumerate(self.train_loader):
            with accelerator.accumulate(self.runner):
                self.schedule.set(update)
                images, labels = images.to(accelerator.device), labels.to(accelerator.device)
                parts, logits = self.objective(self.runner, images, labels)
                gathered.append(len(labels))
                accelerator.backward(parts["loss"] * (len(labels) / gathered[0]))
                if accelerator.sync_gradients:
                    self._average_over_images(gathered)
                    gathered = []
                if accelerator.sync_gradients and self.recipe.clip_norm is not None:
                    accelerator.clip_grad_norm_(self.runner.parameters(), self.recipe.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                update += int(accelerator.sync_gradients)
            with torch.no_grad():
                right += (logits.argmax(1) == labels).sum()
                for name, value in parts.items():
                    totals[name] = totals.get(name, 0) + value.detach().float() * len(labels)
            images_seen += len(labels)
            if (batch + 1) % CHECK_EVERY == 0:
                self._report(epoch, update, totals["loss"], right, images_seen, time.perf_counter() - began)
        self._report(epoch, update, totals["loss"], right, images_seen, time.perf_counter() - began)
        seconds = time.perf_counter() - began
        return self._row(epoch, totals, right, images_seen, seconds)

    def _average_over_images(self, sizes: list[int]) -> None:
        """Makes the gradient of an update the mean over its images, though the last has fewer or smaller batches.

        Each batch counted by its share of the first one, and accelerate divides by the number of whole batches.
        """
        factor = sizes[0] * self.accelerator.gradient_accumulation_steps / sum(sizes)
        if factor != 1:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], factor)

    def _report(self, epoch: int, update: int, loss: Tensor, right: Tensor, images_seen: int, seconds: float) -> None:
        mean = loss.item() / images_seen
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"the loss is {mean} in epoch {epoch + 1}, at update {update}: try a lower learning rate "
                f"(now {self.recipe.lr:g}), --clip-norm 1, or --mixed-precision no"
            )
        rate = images_seen * self.accelerator.num_processes / seconds
        self.reporter.step(epoch, update, mean, 100 * right.item() / images_seen, rate)

    def _row(self, epoch: int, totals: dict[str, Tensor], right: Tensor, images_seen: int, seconds: float) -> Row:
        names = list(totals)
        sums = torch.stack([*totals.values(), right, torch.full_like(right, images_seen)])
        *losses, correct, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        row: Row = {"epoch": epoch + 1}
        row |= {name: value / count for name, value in zip(names, losses, strict=True)}
        row["train_accuracy"] = 100 * correct / count
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["images_per_second"] = count / seconds
        return row

    def _require_finite_weights(self, epoch: int) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"{name} holds numbers that are not finite after epoch {epoch + 1}: try a lower learning rate "
                    f"(now {self.recipe.lr:g}) or --clip-norm 1"
                )

    def state(self) -> dict[str, Any]:
        """Everything that the coming epochs depend on, except what is each process's own (`random_state`)."""
        scaler = self.accelerator.scaler
        return {
            "model": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "progress": vars(self.progress).copy(),
        }

    def load_state(self, state: dict[str, Any], generators: dict[str, Any]) -> None:
        """Goes back to where `state` and `random_state` were taken.

        Raises:
            ValueError: the state belongs to another model.
        """
        load_trained_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        set_random_state(generators)


def training_mode(model: nn.Module) -> None:
    """Training mode for the adapters; dropout, stochastic depth and batch statistics of the backbone stay off."""
    model.train()
    for module in model.modules():
        if isinstance(module, QUIET):
            module.eval()
