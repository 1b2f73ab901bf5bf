"""What `evaluate` and `merge` share: a trained model, and loaders of the data to try it on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import DataLoader

from mosa_kernels.data.classes import differing_classes, mere_numbers
from mosa_kernels.data.loaders import make_loaders
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.train.backbones import data_config
from mosa_kernels.train.evaluate import number_of_experts
from mosa_kernels.train.relevance import refuse_meaningless
from mosa_kernels.train.saved import Saved
from mosa_kernels.train.setup import native_size, open_splits

ANY_CLASSES = "Take data whose classes are not those of training, label by label."
SPLITS = ("validation", "test")


def open_loader(
    saved: Saved,
    split: str,
    console: Console,
    *,
    data: str | None,
    data_root: str | None,
    any_classes: bool,
    batch_size: int,
    workers: int,
) -> tuple[DataSplits, DataLoader[Any]]:
    """The images that a model is tried on, resized and normalised as in its run.

    Args:
        saved: the model and the settings of its run.
        split: "validation" or "test".
        console: where it is said that classes could not be compared by name.
        data, data_root: other data than the run's, or another place of it.
        any_classes: take data whose classes have other names, label by label.
        batch_size, workers: of the loader.

    Raises:
        ValueError: no data is known, other classes or another number of them, or an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    settings = saved.settings
    if data is not None or data_root is not None:
        settings = dataclasses.replace(settings, data=settings.data if data is None else data, data_root=data_root)
    if not settings.data:
        raise ValueError(f"data: {saved.weights} does not say what it was trained on; give --data")
    if data_root is not None:
        refuse_meaningless(settings, ["data_root"])
    splits = open_splits(settings, native_size(settings))
    if splits.num_classes != saved.num_classes:
        raise ValueError(f"data: {splits.name} has {splits.num_classes} classes, the model {saved.num_classes}")
    difference = differing_classes(saved.class_names or splits.classes, splits.classes)
    if difference and not any_classes:
        raise ValueError(
            f"data: {splits.name} has other classes than the model was trained on: {difference}; --any-classes takes "
            "them as they are, label by label"
        )
    if saved.class_names is None:
        console.print(f"note: {saved.weights} does not name its classes: only their number was compared")
    elif mere_numbers(saved.class_names) != mere_numbers(splits.classes):
        console.print(f"note: only one of model and {splits.name} names its classes: only their number was compared")
    loaders = make_loaders(
        splits,
        data_config(saved.model, settings.image_size),
        batch_size,
        workers=workers,
        augment=settings.recipe.augment,  # type: ignore[arg-type]  # checked by the recipe
        evaluation=saved.normalisation,
        evaluation_batch_size=batch_size,
    )
    return splits, loaders.test if split == "test" else loaders.validation


def describe(saved: Saved, path: Path) -> str:
    """Which model this is, in a line."""
    s = saved.settings
    return f"{s.method} from {path} (weights {saved.weights.name}), backbone {s.model}"


def refuse_rule_without_experts(saved: Saved, rule: str | None) -> None:
    """Raises a ValueError where a merge rule is given and nothing is merged by it."""
    if rule is not None and number_of_experts(saved.model) == 1:
        raise ValueError(f"rule: has no effect here: {saved.weights} has no experts that take turns; leave it out")
