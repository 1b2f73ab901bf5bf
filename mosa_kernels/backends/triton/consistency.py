"""Cross-entropy and the divergence of two predictions in one launch each way (arXiv 2312.02923, Eq. 6).

Forward leaves, of each row, what backward needs beside the logits: seven numbers.
"""

# mypy: disallow-incomplete-defs=False
# ruff: noqa: SIM108 (a choice by a constant takes statements)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.consistency import ConsistencyArguments
from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN, dtype_names
from mosa_kernels.backends.tickets import ticket
from mosa_kernels.backends.triton.backend import available, misplaced
from mosa_kernels.backends.triton.launch import Launch, interpreted
from mosa_kernels.backends.triton.pointers import arrives_last, on_device

__all__ = ["available", "consistency_backward", "consistency_forward", "supports_consistency"]

SAVED = 9  # numbers a row: maximum and log of the sum of each pass, both divergences, target mass, two summands
_WIDEST_BLOCK = 2048  # classes at a time
_BATCH_BLOCK = 256
_NUM_WARPS = 4
_CLASSES = (torch.int64, torch.int32, torch.uint8)


@triton.jit
def log_total(logits, classes, BLOCK: tl.constexpr):
    """The maximum of a row and the log of the sum of exp(logits - maximum)."""
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        largest = tl.where(z > largest, z, largest)
    top = tl.max(largest, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < classes, other=float("-inf")).to(tl.float32)
        total += tl.exp(z - top)
    return top, tl.log(tl.sum(total, 0))


@triton.jit
def log_probability(logits, at, inside, top, log_sum):
    return tl.load(logits + at, mask=inside, other=0).to(tl.float32) - top - log_sum


@triton.jit
def wanted(target, at, inside, label, smoothing, classes, SOFT: tl.constexpr):
    """The smoothed distribution that the cross-entropy asks for."""
    if SOFT:
        y = tl.load(target + at, mask=inside, other=0).to(tl.float32)
    else:
        y = tl.where(at == label, 1.0, 0.0)
    return tl.where(inside, (1.0 - smoothing) * y + smoothing / classes.to(tl.float32), 0.0)


@triton.jit
def counts_of(label, classes):
    """1 for a class, 0 for -100, which names none, and NaN for what is no class."""
    known = (label >= 0) & (label < classes)
    return tl.where(known, 1.0, tl.where(label == -100, 0.0, float("nan")))


@triton.jit
def forward_kernel(
    logits1, logits2, target, saved, ticket, cross_entropy, divergence,
    batch, classes, stride1, stride2, target_stride, smoothing,
    SOFT: tl.constexpr, BLOCK: tl.constexpr, BATCH_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits1 += row.to(tl.int64) * stride1
    logits2 += row.to(tl.int64) * stride2
    target += row.to(tl.int64) * target_stride
    top1, log_sum1 = log_total(logits1, classes, BLOCK)
    top2, log_sum2 = log_total(logits2, classes, BLOCK)
    label = 0
    counts = 1.0
    if not SOFT:
        label = tl.load(target).to(tl.int64)
        counts = counts_of(label, classes)
        label = label.to(tl.int32)  # of a class it is the same; in 64 bits Triton 3.6 spills on sm_80
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    both = tl.zeros([BLOCK], tl.float32)
    surprise = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < classes
        log_p1 = log_probability(logits1, at, inside, top1, log_sum1)
        log_p2 = log_probability(logits2, at, inside, top2, log_sum2)
        p1 = tl.where(inside, tl.exp(log_p1), 0.0)
        p2 = tl.where(inside, tl.exp(log_p2), 0.0)
        gap = log_p1 - log_p2
        first += p1 * gap
        second -= p2 * gap
        both += (p1 - p2) * gap  # never below zero
        y = wanted(target, at, inside, label, smoothing, classes, SOFT)
        surprise -= tl.where(y != 0, y * log_p1, 0.0)
        mass += y
    loss = tl.where(counts == 0, 0.0, counts * tl.sum(surprise, 0))
    out = saved + row
    tl.store(out, top1)
    tl.store(out + batch, log_sum1)
    tl.store(out + 2 * batch, top2)
    tl.store(out + 3 * batch, log_sum2)
    tl.store(out + 4 * batch, tl.sum(first, 0))
    tl.store(out + 5 * batch, tl.sum(second, 0))
    tl.store(out + 6 * batch, counts * tl.sum(mass, 0))
    tl.store(out + 7 * batch, loss)
    tl.store(out + 8 * batch, tl.sum(both, 0))
    if arrives_last(ticket, batch):
        losses = tl.zeros([BATCH_BLOCK], tl.float32)
        number = tl.zeros([BATCH_BLOCK], tl.float32)
        gaps = tl.zeros([BATCH_BLOCK], tl.float32)
        for start in range(0, batch, BATCH_BLOCK):
            at = start + tl.arange(0, BATCH_BLOCK)
            inside = at < batch
            losses += tl.load(saved + 7 * batch + at, mask=inside, other=0, cache_modifier=".cg")
            gaps += tl.load(saved + 8 * batch + at, mask=inside, other=0, cache_modifier=".cg")
            mass_of = tl.load(saved + 6 * batch + at, mask=inside, other=0, cache_modifier=".cg")
            number += tl.where(inside & ((mass_of != 0) | SOFT), 1.0, 0.0)
        total = tl.sum(number, 0)
        tl.store(cross_entropy, tl.sum(losses, 0) / total)
        tl.store(divergence, tl.sum(gaps, 0) / batch.to(tl.float32))
        tl.store(saved + 9 * batch, total)


@triton.jit
def backward_kernel(
    logits1, logits2, target, saved, grad_cross_entropy, grad_divergence, grad1, grad2,
    batch, classes, stride1, stride2, target_stride, smoothing,
    SOFT: tl.constexpr, DETACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < classes
    saved_row = saved + row
    log_p1 = log_probability(
        logits1 + row.to(tl.int64) * stride1, at, inside, tl.load(saved_row), tl.load(saved_row + batch)
    )
    log_p2 = log_probability(
        logits2 + row.to(tl.int64) * stride2, at, inside, tl.load(saved_row + 2 * batch), tl.load(saved_row + 3 * batch)
    )
    p1 = tl.exp(log_p1)
    p2 = tl.exp(log_p2)
    slope1 = tl.zeros([BLOCK], tl.float32)
    slope2 = tl.zeros([BLOCK], tl.float32)
    if grad_divergence is not None:
        slope1 += p1 - p2
        slope2 += p2 - p1
        if not DETACH:
            gap = log_p1 - log_p2
            slope1 += p1 * (gap - tl.load(saved_row + 4 * batch))
            slope2 += p2 * (-gap - tl.load(saved_row + 5 * batch))
        weight = tl.load(grad_divergence).to(tl.float32) / batch.to(tl.float32)
        slope1 *= weight
        slope2 *= weight
    if grad_cross_entropy is not None:
        target += row.to(tl.int64) * target_stride
        label = 0
        counts = 1.0
        if not SOFT:
            label = tl.load(target).to(tl.int64)
            counts = counts_of(label, classes)
            label = label.to(tl.int32)
        y = wanted(target, at, inside, label, smoothing, classes, SOFT)
        weight = tl.load(grad_cross_entropy).to(tl.float32) / tl.load(saved + 9 * batch)
        difference = tl.load(saved_row + 6 * batch) * p1 - counts * y
        slope1 += tl.where(counts == 0, 0.0, weight * difference)
    out = row.to(tl.int64) * classes + at
    if grad1 is not None:
        tl.store(grad1 + out, slope1.to(grad1.dtype.element_ty), mask=inside)
    if grad2 is not None:
        tl.store(grad2 + out, slope2.to(grad2.dtype.element_ty), mask=inside)


def supports_consistency(args: ConsistencyArguments) -> tuple[bool, str]:
    """Whether the kernels take these predictions, and if not, why."""
    logits1, logits2, target = args.logits1, args.logits2, args.target
    if reason := misplaced("logits1", logits1, interpreted(forward_kernel)):
        return False, reason
    for name, tensor in (("logits1", logits1), ("logits2", logits2), ("target", target)):
        if type(tensor) not in PLAIN:
            return False, f"{name} is a {type(tensor).__name__}; the kernels take plain tensors"
        if tensor.device != logits1.device:
            return False, f"{name} is on {tensor.device}, logits1 on {logits1.device}"
    for name, tensor in (("logits1", logits1), ("logits2", logits2)):
        if tensor.dtype not in DTYPE_CODES:
            return False, f"{name} is {tensor.dtype}; the kernels take {dtype_names()}"
    if logits1.numel() == 0:
        return False, "logits1 is empty"
    if target.requires_grad:
        return False, "target requires a gradient"
    if target.dtype not in (*DTYPE_CODES, *_CLASSES):
        return False, f"target is {target.dtype}; the kernels take classes and {dtype_names()}"
    return True, ""


def consistency_forward(args: ConsistencyArguments) -> tuple[Tensor, Tensor, Tensor]:
    """The cross-entropy [], the symmetric divergence [], and what backward needs, all float32."""
    logits1, logits2, target = (_in_rows(tensor) for tensor in args[:3])
    batch, classes = logits1.shape
    losses = [torch.empty((), dtype=torch.float32, device=logits1.device) for _ in range(2)]
    saved = torch.empty(SAVED * batch + 1, dtype=torch.float32, device=logits1.device)
    with on_device(logits1.device):
        tensors = (logits1, logits2, target, saved, ticket(logits1.device), *losses)
        scalars = (batch, classes, logits1.stride(0), logits2.stride(0), target.stride(0), args.label_smoothing)
        constants = (target.dtype.is_floating_point, _block(classes), _BATCH_BLOCK)
        Launch(forward_kernel, (batch, 1, 1), tensors, scalars, _SCALAR_TYPES, constants, _NUM_WARPS, 1).run()
    return losses[0], losses[1], saved


def consistency_backward(
    args: ConsistencyArguments,
    saved: Tensor,
    grad_cross_entropy: Tensor | None,
    grad_divergence: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
) -> None:
    """Writes the gradients of the logits that are wanted, contiguous."""
    logits1, logits2, target = (_in_rows(tensor) for tensor in args[:3])
    batch, classes = logits1.shape
    with on_device(logits1.device):
        tensors = (logits1, logits2, target, saved, grad_cross_entropy, grad_divergence, *grads)
        scalars = (batch, classes, logits1.stride(0), logits2.stride(0), target.stride(0), args.label_smoothing)
        block = _block(classes)
        constants = (target.dtype.is_floating_point, args.detach_targets, block)
        grid = (batch, -(-classes // block), 1)
        Launch(backward_kernel, grid, tensors, scalars, _SCALAR_TYPES, constants, _NUM_WARPS, 1).run()


_SCALAR_TYPES = ("i32", "i32", "i64", "i64", "i64", "fp32")


def _in_rows(tensor: Tensor) -> Tensor:
    """With the classes of a row side by side."""
    return tensor if tensor.dim() == 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _block(classes: int) -> int:
    return min(_WIDEST_BLOCK, max(16, 1 << (classes - 1).bit_length()))
