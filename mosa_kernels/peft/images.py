"""What a model takes as a batch of images: a tensor, or the mapping that timm's NaFlex models take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Images: TypeAlias = "Tensor | Mapping[str, Any]"
"""[B, channels, height, width]; or patches [B, N, ...] with further tensors of B rows, and values that are none."""


def patches_of(images: Images) -> Tensor:
    """The tensor whose rows are the images.

    Raises:
        TypeError: neither a tensor, nor a mapping with a tensor of patches.
        ValueError: a tensor of the mapping has another number of rows.
    """
    given = images.get("patches") if isinstance(images, Mapping) else images
    if not isinstance(given, Tensor) or given.dim() < 1:
        what = f"a mapping of {sorted(map(str, images))}" if isinstance(images, Mapping) else type(images).__name__
        raise TypeError(
            "images: expected a tensor [B, channels, height, width] or a mapping with one of 'patches' [B, N, ...], "
            f"got {what}"
        )
    for name, value in images.items() if isinstance(images, Mapping) else ():
        rows = value.shape[0] if isinstance(value, Tensor) and value.dim() else len(given)
        if rows != len(given):
            raise ValueError(f"images[{name!r}]: expected {len(given)} rows, as images['patches'] has, got {rows}")
    return given


def doubled(images: Images) -> Images:
    """The batch twice, one after the other; what has no rows stays."""
    if isinstance(images, Tensor):
        return torch.cat([images, images])
    return {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value
        for name, value in images.items()
    }
