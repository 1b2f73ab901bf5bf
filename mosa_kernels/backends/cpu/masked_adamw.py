"""AdamW on the active entries, for the CPU, by PyTorch's fused AdamW wherever a whole tensor moves by one step size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors, Moved, advance

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def available() -> tuple[bool, str]:
    return True, ""


def supports_masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> tuple[bool, str]:
    device = tensors.params[0].device
    if device.type != "cpu":
        return False, f"params[0] is on {device}, and step counts are read on the host"
    return True, ""


def masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """For the CPU, where the host may read counts and flags at no cost.

    What moves by one step size goes through PyTorch's fused AdamW in one call: ordinary parameters, rows, and split
    parameters whose active experts were active equally often. Where some were not, a copy goes, of which the active
    entries are taken over: 12 adapters of 768 x 64 with one expert of four take 2.5 ms of a thread so, 8.5 with the
    entries picked out and put back. The rest is done parameter by parameter.
    """
    moving = [
        torch.ones_like(t) if a is None else (a != 0).to(t) for t, a in zip(tensors.steps, tensors.active, strict=True)
    ]
    torch._foreach_add_(tensors.steps, moving)
    sizes = [steps.numel() for steps in tensors.steps]
    all_counts = torch.cat([steps.reshape(-1) for steps in tensors.steps]).split(sizes)
    all_flags = torch.cat([flag.reshape(-1) for flag in moving]).split(sizes)

    whole: list[Moved] = []
    whole_counts: list[float] = []
    partly: list[tuple[Moved, Moved, Tensor]] = []
    moved = zip(tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.grads, strict=True)
    for mine, owner, my_counts, my_flags in zip(
        map(Moved._make, moved), tensors.owners, all_counts, all_flags, strict=True
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
            whole += [Moved._make(tensor[row] for tensor in mine) for row in rows]
            whole_counts += [counts[row] for row in rows]
        elif len(used := {count for count, flag in zip(counts, flags, strict=True) if flag}) == 1:
            copied = Moved(mine.param.clone(), mine.exp_avg.clone(), mine.exp_avg_sq.clone(), mine.grad)
            whole.append(copied)
            whole_counts.append(used.pop())
            partly.append((mine, copied, _owned_by(owner, flags, _BITS[mine.param.element_size()])))
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
    for mine, copied, mask in partly:
        for old, new in zip(mine[:3], copied[:3], strict=True):
            _take_over(old, new, mask)


def _take_over(old: Tensor, new: Tensor, mask: Tensor) -> None:
    """Bit by bit, in vectors; `torch.where` with an output goes entry by entry. Spoils `new`."""
    kept, changes = old.view(mask.dtype), new.view(mask.dtype)
    kept.bitwise_xor_(changes.bitwise_xor_(kept).bitwise_and_(mask))


def _owned_by(owner: Tensor, flags: list[float], bits: torch.dtype) -> Tensor:
    """All ones where an active expert owns an entry: a comparison each, which are fewer and faster than look-ups."""
    first, *others = (expert for expert, flag in enumerate(flags) if flag)
    chosen = owner == first
    for expert in others:
        chosen |= owner == expert
    return chosen.to(bits).neg_()


def _advance_some(
    mine: Moved, owner: Tensor | None, counts: list[float], flags: list[float], options: AdamWOptions
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
    moved = Moved._make(_taken(tensor, index).to(dtype) for tensor in flat)
    advance(moved, step_size, root, options)
    for old, entries, new in zip(mine[:3], flat, moved, strict=False):
        if index is not None:
            entries.scatter_(0, index, new.to(old.dtype))
        elif new is not entries:
            entries.copy_(new)
        if entries.data_ptr() != old.data_ptr():
            old.copy_(entries.view(old.shape))


def _taken(entries: Tensor, index: Tensor | None) -> Tensor:
    return entries if index is None else entries.index_select(0, index)
