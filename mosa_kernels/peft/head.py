"""The classifier of a timm model as something that can be taken out, kept and put back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Head(nn.ModuleList):
    """One task's classifier: the modules at `head_paths`, and how many classes they tell apart."""

    def __init__(self, modules: Sequence[nn.Module], num_classes: int) -> None:
        super().__init__(modules)
        self.num_classes = num_classes


def head_paths(model: nn.Module) -> list[str]:
    """Where the model has its classifier: one path, two for distilled models.

    Raises:
        TypeError: the model has no `get_classifier`, as timm's models have.
    """
    if not hasattr(model, "get_classifier"):
        raise TypeError(f"model: expected a timm model with get_classifier(), got {type(model).__name__}")
    timm_model: Any = model
    classifier = timm_model.get_classifier()
    wanted = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    paths = {id(module): path for path, module in model.named_modules() if path}
    return [paths[id(module)] for module in wanted if module is not None]


def current_head(model: nn.Module) -> Head:
    """The classifier in the model, the very modules."""
    return Head([model.get_submodule(path) for path in head_paths(model)], int(getattr(model, "num_classes", 0)))


def install_head(model: nn.Module, head: Head) -> None:
    """Puts a classifier into the model in place of its own."""
    for path, module in zip(head_paths(model), head, strict=True):
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        setattr(parent, name, module)
        if parent is not model and hasattr(parent, "num_classes"):
            vars(parent)["num_classes"] = head.num_classes
    vars(model)["num_classes"] = head.num_classes


def fresh_head(model: nn.Module, num_classes: int) -> Head:
    """A new classifier as timm initialises it; the model keeps its own."""
    kept = current_head(model)
    reference = next(model.parameters())
    try:
        model.reset_classifier(num_classes)  # type: ignore[operator]
        made = current_head(model)
    finally:
        install_head(model, kept)
    return made.to(device=reference.device, dtype=reference.dtype)


def copy_head(head: Head) -> Head:
    with torch.no_grad():
        return copy.deepcopy(head)
