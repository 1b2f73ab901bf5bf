"""What the compiled kernels of the optimizer share: which steps they take, and how these are described."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN, dtype_names
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors

_MOST_ENTRIES = 2**31 - 1
_MOST_EXPERTS = 256  # kMaxAdamWExperts of csrc/masked_adamw.h


def takes(tensors: AdamWTensors, options: AdamWOptions, strided: bool = False) -> tuple[bool, str]:
    """Whether the kernels take this step, all of it on one device, and if not, why.

    `strided`: parameters and moments may lie as they like.
    """
    device, here = tensors.params[0].device, tensors.params[0].get_device()
    if torch.compiler.is_compiling():
        return False, "params[0] is being traced and has no address"
    for index, (p, grad, exp_avg, exp_avg_sq, steps, owner, active) in enumerate(zip(*tensors, strict=True)):
        dtype = p.dtype
        if type(p) not in PLAIN:
            return False, f"params[{index}] is a {type(p).__name__}; the kernel takes plain tensors"
        if dtype not in DTYPE_CODES:
            return False, f"params[{index}] is {dtype}; the kernel takes {dtype_names()}"
        if grad.dtype != dtype or exp_avg.dtype != dtype or exp_avg_sq.dtype != dtype:
            return False, f"params[{index}], its gradient and its moments differ in dtype"
        if not (strided or (p.is_contiguous() and exp_avg.is_contiguous() and exp_avg_sq.is_contiguous())):
            return False, f"params[{index}] or a moment of it is not contiguous"
        if p.numel() > _MOST_ENTRIES:
            return False, f"params[{index}] has {p.numel()} entries; the kernel takes {_MOST_ENTRIES}"
        if steps.dtype != torch.float32 or not steps.is_contiguous() or steps.numel() > _MOST_EXPERTS:
            return False, f"steps[{index}] is not contiguous float32 of at most {_MOST_EXPERTS} counts"
        if p.get_device() != here or grad.get_device() != here or steps.get_device() != here:
            return False, f"params[{index}], its gradient or its counts are not on {device}"
        if exp_avg.get_device() != here or exp_avg_sq.get_device() != here:
            return False, f"exp_avgs[{index}] or exp_avg_sqs[{index}] is not on {device}"
        if owner is not None and (not owner.is_contiguous() or owner.get_device() != here):
            return False, f"owners[{index}] is not contiguous on {device}"
        if active is not None and (
            active.dtype != torch.float32 or not active.is_contiguous() or active.get_device() != here
        ):
            return False, f"active[{index}] is not contiguous float32 on {device}"
    lr = options.lr
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64)):
        return False, f"lr is {lr.dtype} {list(lr.shape)}; the kernel takes one float32 or float64"
    return True, ""


def numbers_of(tensors: AdamWTensors) -> tuple[list[int], list[Tensor]]:
    """A row of numbers for each tensor, as csrc/masked_adamw_bindings.cpp reads them, and the gradients they name."""
    grads = [grad.contiguous() for grad in tensors.grads]
    numbers: list[int] = []
    for p, grad, exp_avg, exp_avg_sq, steps, owner, active in zip(*tensors._replace(grads=grads), strict=True):
        numbers += (
            p.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if owner is None else owner.data_ptr(),
            steps.data_ptr(),
            0 if active is None else active.data_ptr(),
            p.numel(),
            steps.numel(),
            DTYPE_CODES[p.dtype],
        )
    return numbers, grads
