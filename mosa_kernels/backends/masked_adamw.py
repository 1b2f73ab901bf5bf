"""AdamW that moves only the entries of active experts, in PyTorch."""

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


class AdamWOptions(NamedTuple):
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def reference(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """Parameter by parameter, on any device, without reading a value back to the host."""
    for p, grad, exp_avg, exp_avg_sq, steps, owner, active in zip(*tensors, strict=True):
        moving = torch.ones_like(steps, dtype=torch.bool) if active is None else active != 0
        steps += moving
        # Counts are exact in float32; 1 - beta^t is not where t is small, hence expm1. A count of 0 never moves.
        exponent = steps.clamp(min=1).to(torch.promote_types(p.dtype, torch.float32))
        correction1 = -torch.expm1(exponent * _log(options.beta1))
        correction2 = -torch.expm1(exponent * _log(options.beta2))
        mask = None if active is None else _per_entry(moving, p, owner)
        step_size = _per_entry(options.lr / correction1, p, owner)
        root = _per_entry(correction2.rsqrt(), p, owner)
        _move(p, grad, exp_avg, exp_avg_sq, mask, step_size, root, options)


def foreach(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """For the CPU, where the host may read counts and flags at no cost.

    Parameters that move as a whole by one step size go through `torch._foreach_*` together; the others one by one,
    with as few per-entry factors as their counts need.
    """
    moving = [torch.ones_like(t) if a is None else (a != 0).to(t) for t, a in zip(tensors.steps, tensors.active, strict=True)]
    torch._foreach_add_(tensors.steps, moving)
    counts = torch.cat([steps.reshape(-1) for steps in tensors.steps]).tolist()
    flags = torch.cat([flag.reshape(-1) for flag in moving]).tolist()

    whole: list[int] = []
    whole_counts: list[float] = []
    first = 0
    for index, steps in enumerate(tensors.steps):
        last = first + steps.numel()
        different = {count for count, flag in zip(counts[first:last], flags[first:last], strict=True) if flag}
        if len(different) == 1 and all(flags[first:last]):
            whole.append(index)
            whole_counts.append(counts[first])
        elif different:
            _move_some(tensors, index, counts[first:last], flags[first:last], options)
        first = last
    if whole:
        _move_together(tensors, whole, whole_counts, options)


def _move_together(tensors: AdamWTensors, chosen: list[int], counts: list[float], options: AdamWOptions) -> None:
    params, grads, exp_avgs, exp_avg_sqs = ([column[i] for i in chosen] for column in tensors[:4])
    low_precision = [i for i, p in enumerate(params) if p.dtype.itemsize < 4]
    if low_precision:
        stored = [*params, *exp_avgs, *exp_avg_sqs]
        params, grads, exp_avgs, exp_avg_sqs = (
            [t.float() if t.dtype.itemsize < 4 else t for t in column]
            for column in (params, grads, exp_avgs, exp_avg_sqs)
        )
    step_sizes = [-float(options.lr) / (1 - options.beta1**count) for count in counts]
    roots = [(1 - options.beta2**count) ** 0.5 for count in counts]
    torch._foreach_lerp_(exp_avgs, grads, 1 - options.beta1)
    torch._foreach_mul_(exp_avg_sqs, options.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - options.beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, roots)
    torch._foreach_add_(denominators, options.eps)
    if options.weight_decay:
        torch._foreach_mul_(params, 1 - float(options.lr) * options.weight_decay)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, step_sizes)
    if low_precision:
        torch._foreach_copy_(stored, [*params, *exp_avgs, *exp_avg_sqs])


def _move_some(
    tensors: AdamWTensors, index: int, counts: list[float], flags: list[float], options: AdamWOptions
) -> None:
    p, grad, exp_avg, exp_avg_sq, _, owner, _ = (column[index] for column in tensors)
    assert p is not None and grad is not None and exp_avg is not None and exp_avg_sq is not None
    dtype = torch.promote_types(p.dtype, torch.float32)

    def per_entry(values: list[float]) -> float | Tensor:
        used = {value for value, flag in zip(values, flags, strict=True) if flag}
        return used.pop() if len(used) == 1 else _per_entry(torch.tensor(values, dtype=dtype), p, owner)

    counts = [max(count, 1.0) for count in counts]
    mask = None if all(flags) else _per_entry(torch.tensor(flags, dtype=torch.bool), p, owner)
    step_size = per_entry([float(options.lr) / (1 - options.beta1**count) for count in counts])
    root = per_entry([(1 - options.beta2**count) ** -0.5 for count in counts])
    _move(p, grad, exp_avg, exp_avg_sq, mask, step_size, root, options)


def _move(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    step_size: float | Tensor,
    root: float | Tensor,
    options: AdamWOptions,
) -> None:
    """One parameter's step: `step_size` is lr / (1 - beta1^t) and `root` is 1 / sqrt(1 - beta2^t), per entry."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    grad = grad.to(dtype)
    new_avg = exp_avg.to(dtype).lerp(grad, 1 - options.beta1)
    new_avg_sq = (exp_avg_sq.to(dtype) * options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
    denominator = new_avg_sq.sqrt().mul_(root).add_(options.eps)
    new_p = p.to(dtype) * (1 - options.lr * options.weight_decay)
    new_p -= (new_avg * step_size).div_(denominator)
    for stored, new in ((p, new_p), (exp_avg, new_avg), (exp_avg_sq, new_avg_sq)):
        # Selected, not multiplied: what stands still does so bit by bit, whatever its gradient holds.
        stored.copy_(new if mask is None else torch.where(mask, new, stored))


def _per_entry(values: Tensor, p: Tensor, owner: Tensor | None) -> Tensor:
    """Values [] or [N], one per expert, as a tensor that broadcasts against the parameter."""
    if owner is not None:
        return values.index_select(0, owner.reshape(-1).int()).view(p.shape)
    return values if values.dim() == 0 else values.view(-1, *(1,) * (p.dim() - 1))


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
