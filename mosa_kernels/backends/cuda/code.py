"""Whether a GPU runs the machine code that was built."""

from __future__ import annotations

import torch

from mosa_kernels._extension import why_no_code_for

_known: dict[int, str | None] = {}


@torch.compiler.assume_constant_result  # a graph that asks first would break at the import of the compiled module
def why_no_code(device: torch.device) -> str | None:
    """Why a CUDA device cannot run the kernels of `_C`; None where it can. GPUs of one machine may differ."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _known:
        _known[index] = why_no_code_for(torch.cuda.get_device_capability(index))
    return _known[index]
