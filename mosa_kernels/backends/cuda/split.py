"""Random balanced owners (arXiv 2312.02923, Eq. 3), drawn by one kernel where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.cuda.backend import available
from mosa_kernels.backends.cuda.code import why_no_code
from mosa_kernels.backends.cuda.device import current
from mosa_kernels.backends.split import SplitLayout

__all__ = ["available", "split", "supports_split"]


def supports_split(layout: SplitLayout, seed: Tensor, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel makes this split, and if not, why."""
    if device.type != "cuda":
        return False, f"device: expected a CUDA device, got {device}"
    if torch.compiler.is_compiling() or type(seed) is not Tensor:
        return False, "seed: has no value while it is traced"
    reason = why_no_code(device)
    if reason is not None:
        return False, reason
    return True, ""


def split(layout: SplitLayout, seed: Tensor, device: torch.device) -> Tensor:
    """As `backends.split.split`, bit by bit, enqueued on the current stream.

    A seed on the same device is read there by the kernel; another one is read by the host first.
    """
    module = extension().module
    assert module is not None
    owners = torch.empty(layout.rows, layout.columns, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(owners.device)
    address, value = (seed.data_ptr(), 0) if seed.device == owners.device else (0, int(seed))
    with current(owners.device):
        module.split_cuda(owners.data_ptr(), address, value, layout, stream.device_index, stream.cuda_stream)
    return owners
