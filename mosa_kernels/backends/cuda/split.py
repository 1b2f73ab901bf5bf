"""Random balanced owners (arXiv 2312.02923, Eq. 3), drawn by one kernel where they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels._extension import extension, has_code_for
from mosa_kernels.backends.split import SplitLayout


def supports_split(device: torch.device) -> tuple[bool, str]:
    """Whether the kernel makes a split for this device, and if not, why."""
    if device.type != "cuda":
        return False, f"device: expected a CUDA device, got {device}"
    reason = extension().cuda_reason
    if reason is not None:
        return False, reason
    capability = torch.cuda.get_device_capability(device)
    if not has_code_for(capability):
        return False, "the CUDA kernels were not built for sm_{}{}".format(*capability)
    return True, ""


def split(layout: SplitLayout, seed: Tensor | int, device: torch.device) -> Tensor:
    """As `backends.split.reference`, bit by bit, enqueued on the current stream.

    Args:
        seed: a number, or int64 [] on `device`, where the kernel reads it: nothing waits.
    """
    module = extension().module
    assert module is not None
    owners = torch.empty(layout.rows, layout.columns, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(owners.device)
    address, number = (seed.data_ptr(), 0) if isinstance(seed, Tensor) else (0, seed)
    module.split_cuda(owners.data_ptr(), address, number, layout, stream.device_index, stream.cuda_stream)
    return owners
