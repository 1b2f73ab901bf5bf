"""One step of AdamW on the active entries of all parameters, in one launch (arXiv 2312.02923, Eq. 4)."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.cuda.backend import available
from mosa_kernels.backends.cuda.code import why_no_code
from mosa_kernels.backends.cuda.device import current
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.masked_adamw_kernels import numbers_of, takes
from mosa_kernels.backends.tickets import ticket

__all__ = ["available", "masked_adamw", "supports_masked_adamw"]

_LARGE_PARAMETERS = 12010  # the first driver that takes 32 KiB of kernel parameters in place of 4


def supports_masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> tuple[bool, str]:
    """Whether the kernel takes this step, and if not, why."""
    device = tensors.params[0].device
    if device.type != "cuda":
        return False, f"params[0] is on {device}, not on a CUDA device"
    reason = why_no_code(device)
    if reason is not None:
        return False, reason
    return takes(tensors, options)


def masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """One step, in place, enqueued on the current stream. The host reads nothing back and copies nothing.

    Addresses, sizes and options travel as parameters of the kernel: one launch takes 454 tensors (55 with a driver
    older than CUDA 12.1), that is 75 adapters of 6. A CUDA graph that captured the step reads gradients, flags and an
    lr on the device anew at every replay.
    """
    module = extension().module
    assert module is not None
    device = tensors.params[0].device
    stream = torch.cuda.current_stream(device)
    large = _takes_large_parameters()
    with current(device):
        launch(module, tensors, options, ticket(device), large, stream.device_index, stream.cuda_stream)


def launch(
    module: ModuleType,
    tensors: AdamWTensors,
    options: AdamWOptions,
    ticket: Tensor,
    large_parameters: bool,
    device: int,
    stream: int,
) -> None:
    """Hands the step to the compiled module.

    Args:
        ticket: int32 [1], zero before and after; launches that may overlap need different ones.
        large_parameters: whether a launch may have more than 4 KiB of parameters.
    """
    numbers, _copies = numbers_of(tensors)  # copies have to live until the kernel is enqueued
    lr, beta1, beta2, eps, weight_decay = options
    read_there = isinstance(lr, Tensor) and lr.device == ticket.device
    module.masked_adamw_cuda(
        numbers,
        lr_address=lr.data_ptr() if isinstance(lr, Tensor) and read_there else 0,
        lr_is_double=isinstance(lr, Tensor) and lr.dtype == torch.float64,
        lr=0.0 if read_there else float(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        ticket=ticket.data_ptr(),
        large_parameters=large_parameters,
        device=device,
        stream=stream,
    )


@cache
def _takes_large_parameters() -> bool:
    module = extension().module
    return module is not None and module.cuda_driver_version() >= _LARGE_PARAMETERS
