"""The element types that kernels tell apart by a number at run time."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""As csrc/dtype.h and the tables of the Triton kernels number them."""


PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Whose memory is where `data_ptr` says; a subclass may hold anything."""


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory holds its values: no view with a minus sign pending, and no zeros without memory."""
    if tensor.is_neg():
        return tensor.resolve_neg()
    return torch.zeros_like(tensor) if tensor._is_zerotensor() else tensor


def dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)
