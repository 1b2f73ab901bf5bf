"""AdamW that moves only the entries of active experts, in PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw


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


class _Moved(NamedTuple):
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


def reference(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """Parameter by parameter, on any device, without reading a value back to the host."""
    for p, grad, exp_avg, exp_avg_sq, steps, owner, active in zip(*tensors, strict=True):
        moving = torch.ones_like(steps, dtype=torch.bool) if active is None else active != 0
        steps += moving
        dtype = torch.promote_types(p.dtype, torch.float32)
        # Counts are exact in float32; 1 - beta^t is not where t is small, hence expm1. A count of 0 never moves.
        exponent = steps.clamp(min=1).to(dtype)
        step_size = options.lr / -torch.expm1(exponent * _log(options.beta1))
        root = (-torch.expm1(exponent * _log(options.beta2))).sqrt()
        stored = (p, exp_avg, exp_avg_sq)
        moved = _Moved._make([*(tensor.to(dtype, copy=True) for tensor in stored), grad.to(dtype)])
        _advance(moved, _per_entry(step_size, p, owner), _per_entry(root, p, owner), options)
        mask = _per_entry(moving, p, owner)
        for old, new in zip(stored, moved[:3], strict=True):
            # Selected, not multiplied: what stands still does so bit by bit, whatever its gradient holds.
            old.copy_(torch.where(mask, new, old))


def cpu(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """For the CPU, where the host may read counts and flags at no cost.

    What moves as a whole by one step size goes through PyTorch's fused AdamW in one call: ordinary parameters, rows,
    and split parameters whose experts were all active equally often. The rest is done parameter by parameter.
    """
    moving = [
        torch.ones_like(t) if a is None else (a != 0).to(t) for t, a in zip(tensors.steps, tensors.active, strict=True)
    ]
    torch._foreach_add_(tensors.steps, moving)
    sizes = [steps.numel() for steps in tensors.steps]
    all_counts = torch.cat([steps.reshape(-1) for steps in tensors.steps]).split(sizes)
    all_flags = torch.cat([flag.reshape(-1) for flag in moving]).split(sizes)

    whole: list[_Moved] = []
    whole_counts: list[float] = []
    moved = zip(tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.grads, strict=True)
    for mine, owner, my_counts, my_flags in zip(
        map(_Moved._make, moved), tensors.owners, all_counts, all_flags, strict=True
    ):
        counts, flags = my_counts.tolist(), my_flags.tolist()
        if not any(flags):
            continue
        if not all(tensor.is_contiguous() for tensor in mine):
            _advance_some(mine, owner, counts, flags, options)
        elif all(flags) and len(set(counts)) == 1:
            whole.append(mine)
            whole_counts.append(counts[0])
        elif owner is None:
            rows = [row for row, flag in enumerate(flags) if flag]
            whole += [_Moved._make(tensor[row] for tensor in mine) for row in rows]
            whole_counts += [counts[row] for row in rows]
        else:
            _advance_some(mine, owner, counts, flags, options)
    if whole:
        params, exp_avgs, exp_avg_sqs, grads = (list(column) for column in zip(*whole, strict=True))
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            list((torch.tensor(whole_counts) - 1).unbind()),  # it counts the step itself
            fused=True,
            amsgrad=False,
            beta1=options.beta1,
            beta2=options.beta2,
            lr=options.lr,
            weight_decay=options.weight_decay,
            eps=options.eps,
            maximize=False,
        )


def _advance_some(
    mine: _Moved, owner: Tensor | None, counts: list[float], flags: list[float], options: AdamWOptions
) -> None:
    """Moves the active entries of one parameter, taken out and put back unless all are active."""
    dtype = torch.promote_types(mine.param.dtype, torch.float32)
    if owner is None:
        expert = torch.arange(len(flags), dtype=torch.int32).repeat_interleave(mine.param.numel() // len(flags))
    else:
        expert = owner.reshape(-1).int()  # [entries]
    index = None
    if not all(flags):
        index = torch.tensor(flags, dtype=torch.bool).index_select(0, expert).nonzero().squeeze(1)

    def per_entry(values: list[float]) -> float | Tensor:
        used = {value for value, flag in zip(values, flags, strict=True) if flag}
        if len(used) == 1:
            return used.pop()
        return torch.tensor(values, dtype=dtype).index_select(0, _taken(expert, index))

    counts = [max(count, 1.0) for count in counts]
    step_size = per_entry([float(options.lr) / (1 - options.beta1**count) for count in counts])
    root = per_entry([(1 - options.beta2**count) ** 0.5 for count in counts])
    flat = [tensor.reshape(-1) for tensor in mine]
    moved = _Moved._make(_taken(tensor, index).to(dtype) for tensor in flat)
    _advance(moved, step_size, root, options)
    for old, entries, new in zip(mine[:3], flat, moved, strict=False):
        if index is not None:
            entries.scatter_(0, index, new.to(old.dtype))
        elif new is not entries:
            entries.copy_(new)
        if entries.data_ptr() != old.data_ptr():
            old.copy_(entries.view(old.shape))


def _taken(entries: Tensor, index: Tensor | None) -> Tensor:
    return entries if index is None else entries.index_select(0, index)


def _advance(moved: _Moved, step_size: float | Tensor, root: float | Tensor, options: AdamWOptions) -> None:
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


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
