"""The learning rate over a run: linear warm-up, then half a cosine (arXiv 2312.02923, Table 12), by timm."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler

from mosa_kernels.train.recipe import Recipe


class Schedule:
    """Sets the learning rate of each update.

    With w warm-up and T total updates (or epochs, where the recipe says so), step t = 0, 1, ... runs at
    ``lr * t / w`` while t < w and at ``lr * (1 + cos(pi * (t - w) / (T - w))) / 2`` afterwards.

    Args:
        optimizer: its groups' learning rates are the peaks.
        recipe: length and warm-up in epochs.
        updates_per_epoch: optimizer steps an epoch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int) -> None:
        if updates_per_epoch < 1:
            raise ValueError(f"updates_per_epoch: expected at least 1, got {updates_per_epoch}")
        self.updates_per_epoch = updates_per_epoch
        self.per_epoch = recipe.lr_per_epoch
        steps = 1 if self.per_epoch else updates_per_epoch
        warmup = round(recipe.warmup_epochs * steps)
        if (
            self.per_epoch and recipe.warmup_epochs > 0
        ):  # the first of several epochs runs at zero, however few they are
            warmup = min(max(1, warmup), recipe.epochs - 1)
        self._timm = CosineLRScheduler(
            optimizer,
            t_initial=max(2, recipe.epochs * steps - warmup),  # of one step timm warns; it is at the peak either way
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=self.per_epoch,
        )
        self.set(0)

    def set(self, update: int) -> None:
        """Before update number `update`, counted from 0 over the whole run."""
        if self.per_epoch:
            self._timm.step(update // self.updates_per_epoch)
        else:
            self._timm.step_update(update)
