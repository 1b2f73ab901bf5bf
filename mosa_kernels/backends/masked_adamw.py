"""AdamW that moves only the entries of active experts (arXiv 2312.02923, Eq. 4): what a step is, and its definition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamWTensors(NamedTuple):
    """What one step works on: lists of equal length, one item per parameter.

    A parameter is *ordinary* (steps [], no owner), *split by entry* (steps [N] and an owner) or *split by row*
    (steps [N], no owner: row e belongs to expert e).
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]  # float32 [] or [N], counted up by the step
    owners: list[Tensor | None]  # uint8, shaped like the parameter
    active: list[Tensor | None]  # [] or [N], nonzero where it moves; None: everything moves


class Moved(NamedTuple):
    """One parameter, or the part of it that moves."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad: Tensor


class AdamWOptions(NamedTuple):
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def available() -> tuple[bool, str]:
    return True, ""


def supports_masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> tuple[bool, str]:
    return True, ""


def masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """Parameter by parameter, on any device, without reading a value back to the host."""
    for p, grad, exp_avg, exp_avg_sq, steps, owner, active in zip(*tensors, strict=True):
        moving = torch.ones_like(steps, dtype=torch.bool) if active is None else active != 0
        steps += moving
        dtype = torch.promote_types(p.dtype, torch.float32)
        own = options
        if isinstance(options.lr, Tensor):
            own = options._replace(lr=options.lr.to(dtype))
        # Counts are exact in float32; 1 - beta^t is not where t is small, hence expm1. A count of 0 never moves.
        exponent = steps.clamp(min=1).to(dtype)
        step_size = own.lr / -torch.expm1(exponent * log_of(options.beta1))
        root = (-torch.expm1(exponent * log_of(options.beta2))).sqrt()
        stored = (p, exp_avg, exp_avg_sq)
        moved = Moved._make([*(tensor.to(dtype, copy=True) for tensor in stored), grad.to(dtype)])
        advance(moved, _per_entry(step_size, p, owner), _per_entry(root, p, owner), own)
        mask = _per_entry(moving, p, owner)
        for old, new in zip(stored, moved[:3], strict=True):
            # Selected, not multiplied: what stands still does so bit by bit, whatever its gradient holds.
            old.copy_(torch.where(mask, new, old))


def advance(moved: Moved, step_size: float | Tensor, root: float | Tensor, options: AdamWOptions) -> None:
    """AdamW in place, where `step_size` is lr / (1 - beta1^t) and `root` is sqrt(1 - beta2^t)."""
    p, exp_avg, exp_avg_sq, grad = moved
    exp_avg.lerp_(grad, 1 - options.beta1)
    exp_avg_sq.mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
    p.mul_(1 - options.lr * options.weight_decay)
    p.sub_((exp_avg * step_size).div_(exp_avg_sq.sqrt().div_(root).add_(options.eps)))


def _per_entry(values: Tensor, p: Tensor, owner: Tensor | None) -> Tensor:
    """Values [] or [N], one per expert, as a tensor that broadcasts against the parameter."""
    if owner is not None:
        return values.index_select(0, owner.reshape(-1).int()).view(p.shape)
    return values if values.dim() == 0 else values.view(-1, *(1,) * (p.dim() - 1))


def log_of(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
