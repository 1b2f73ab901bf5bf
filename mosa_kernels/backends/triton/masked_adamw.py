"""One step of AdamW on the active entries of all parameters, in one launch (arXiv 2312.02923, Eq. 4).

An entry of a float32 parameter split by entry costs 29 bytes of memory traffic: 16 to read the parameter, its gradient
and both moments, 1 for its owner, 12 to write. What stands still is written back as it was read, since stores that
leave out single entries would need a store instruction for each.
"""

# mypy: disallow-incomplete-defs=False
# ruff: noqa: SIM102 (what a constant leaves out has an `if` of its own)
from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.element_types import DTYPE_CODES
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors, log_of
from mosa_kernels.backends.masked_adamw_kernels import takes
from mosa_kernels.backends.tickets import capturing
from mosa_kernels.backends.triton.backend import available, misplaced
from mosa_kernels.backends.triton.launch import ALIGNMENT, Launch, interpreted
from mosa_kernels.backends.triton.pointers import (
    arrives_last,
    entry,
    find_item,
    first_programs,
    keep,
    on_device,
    padded_items,
    pointer,
    upload,
)

__all__ = ["available", "masked_adamw", "supports_masked_adamw"]

BLOCK = 1024
NUM_WARPS = 8  # four entries a thread: one load of 16 bytes for each tensor in float32
_MOST_TABLES = 8  # optimizers, parameter groups and devices that take turns
_FEWEST_EXPERTS = 4


@triton.jit
def one_minus_power(steps, log_beta):
    """1 - beta^steps; by its series where the difference would cancel."""
    x = steps * log_beta
    series = 1.0 + x * (1 / 9)
    series = 1.0 + x * (1 / 8) * series
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = 1.0 + x * (1 / 2) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def advance(
    table, changing, items, item, index, size, owner, num_experts, steps, active, rate,
    log_beta1, log_beta2, gain1, beta2, gain2, eps, weight_decay,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """AdamW on a block of entries. Of those that do not move the very bits are kept."""
    inside = index < size
    param_at = pointer(entry(table, 8, items, item), DTYPE, ALIGNED) + index
    average_at = pointer(entry(table, 9, items, item), DTYPE, ALIGNED) + index
    square_at = pointer(entry(table, 10, items, item), DTYPE, ALIGNED) + index
    p = tl.load(param_at, mask=inside)
    m = tl.load(average_at, mask=inside)
    v = tl.load(square_at, mask=inside)
    g = tl.load(pointer(entry(changing, 0, items, item), DTYPE, ALIGNED) + index, mask=inside).to(tl.float32)

    # Of each expert, while the entries are on their way. An owner that is no expert stands still.
    step_sizes = rate / one_minus_power(steps, log_beta1)
    inverse_roots = tl.where(active, tl.rsqrt(one_minus_power(steps, log_beta2)), 0.0)
    listed = tl.minimum(owner, EXPERTS - 1)
    step_size = tl.gather(step_sizes, listed, 0)
    inverse_root = tl.gather(inverse_roots, listed, 0)
    moves = (inverse_root > 0) & (owner < num_experts)

    average = m.to(tl.float32) + gain1 * (g - m.to(tl.float32))
    square = beta2 * v.to(tl.float32) + gain2 * (g * g)
    change = step_size * average / (tl.sqrt(square) * inverse_root + eps)
    value = p.to(tl.float32)
    value = value - rate * weight_decay * value - change
    tl.store(param_at, tl.where(moves, value.to(DTYPE), p), mask=inside)
    tl.store(average_at, tl.where(moves, average.to(DTYPE), m), mask=inside)
    tl.store(square_at, tl.where(moves, square.to(DTYPE), v), mask=inside)


@triton.jit
def masked_adamw_kernel(
    table, changing, tickets, lr_tensor,
    items, lr, log_beta1, log_beta2, gain1, beta2, gain2, eps, weight_decay,
    FLOAT32: tl.constexpr, FLOAT16: tl.constexpr, BFLOAT16: tl.constexpr,
    ALIGNED: tl.constexpr, ITEMS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = find_item(table, program, items, ITEMS)
    block = program - entry(table, 0, items, item).to(tl.int32)
    programs = entry(table, 1, items, item).to(tl.int32)
    size = entry(table, 2, items, item).to(tl.int32)
    row_size = entry(table, 3, items, item).to(tl.int32)
    num_experts = entry(table, 4, items, item).to(tl.int32)
    dtype = entry(table, 5, items, item)
    owner_address = entry(table, 6, items, item)
    counts = pointer(entry(table, 7, items, item), tl.float32, False)
    active_address = entry(changing, 1, items, item)
    if ALIGNED:
        size = tl.multiple_of(size, 16)

    index = block * BLOCK + tl.arange(0, BLOCK)
    if owner_address != 0:
        owner = tl.load(pointer(owner_address, tl.uint8, ALIGNED) + index, mask=index < size, other=0).to(tl.int32)
    else:
        owner = index // row_size
    experts = tl.arange(0, EXPERTS)
    active = experts < num_experts
    steps = tl.load(counts + experts, mask=active, other=0) + 1
    if active_address != 0:
        flags = tl.load(pointer(active_address, tl.float32, False) + experts, mask=active, other=0)
        active = flags != 0
    rate = lr
    if lr_tensor is not None:
        rate = tl.load(lr_tensor).to(tl.float32)

    if FLOAT32:
        if dtype == 0:
            advance(
                table, changing, items, item, index, size, owner, num_experts, steps, active, rate, log_beta1,
                log_beta2, gain1, beta2, gain2, eps, weight_decay, tl.float32, ALIGNED, EXPERTS,
            )  # fmt: skip
    if FLOAT16:
        if dtype == 1:
            advance(
                table, changing, items, item, index, size, owner, num_experts, steps, active, rate, log_beta1,
                log_beta2, gain1, beta2, gain2, eps, weight_decay, tl.float16, ALIGNED, EXPERTS,
            )  # fmt: skip
    if BFLOAT16:
        if dtype == 2:
            advance(
                table, changing, items, item, index, size, owner, num_experts, steps, active, rate, log_beta1,
                log_beta2, gain1, beta2, gain2, eps, weight_decay, tl.bfloat16, ALIGNED, EXPERTS,
            )  # fmt: skip
    # Every program works with the old counts plus one; the last one of a parameter writes them.
    if arrives_last(tickets + item, programs):
        tl.store(counts + experts, steps, mask=active)


SCALAR_TYPES = ("i32", *("fp32",) * 8)
_LARGEST = 2**31 - BLOCK


def supports_masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> tuple[bool, str]:
    """Whether the kernel takes this step, and if not, why."""
    if reason := misplaced("params[0]", tensors.params[0], interpreted(masked_adamw_kernel)):
        return False, reason
    for index, p in enumerate(tensors.params):
        if p.numel() > _LARGEST:
            return False, f"params[{index}] has {p.numel()} entries, at most {_LARGEST} are taken"
    return takes(tensors, options)


def masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """One step, in place, in one launch. Nothing is read back, so a CUDA graph can hold it.

    The table of what stays where it is lies on the device and is used again. Where gradients or flags have moved since
    the last step, their addresses are copied anew, 16 bytes a parameter from pinned memory.
    """
    # Copies of strided gradients have to live until the launch.
    tensors = tensors._replace(grads=[grad.contiguous() for grad in tensors.grads])
    with on_device(tensors.params[0].device):
        step_launch(tensors, options).run()


def step_launch(tensors: AdamWTensors, options: AdamWOptions) -> Launch:
    """The launch of one step with gradients that are contiguous."""
    known = _table_of(tensors)
    changing, aligned = known.changing(tensors.grads, tensors.active)
    lr = options.lr
    lr_tensor = lr if isinstance(lr, Tensor) and lr.device == tensors.params[0].device else None
    return Launch(
        masked_adamw_kernel,
        (known.programs, 1, 1),
        (known.table, changing, known.tickets, lr_tensor),
        (
            len(tensors.params),
            1.0 if lr_tensor is not None else float(lr),
            log_of(options.beta1),
            log_of(options.beta2),
            1 - options.beta1,
            options.beta2,
            1 - options.beta2,
            options.eps,
            options.weight_decay,
        ),
        SCALAR_TYPES,
        (*known.dtypes, known.aligned and aligned, padded_items(len(tensors.params)), known.padded_experts, BLOCK),
        NUM_WARPS,
        1,
    )


@dataclass
class _Table:
    """What stays as it is while parameters, moments, counts and owners stay where they are."""

    table: Tensor  # int64 [11, items]
    tickets: Tensor  # int32 [items], zero between launches
    programs: int
    dtypes: tuple[bool, bool, bool]  # which ones occur
    aligned: bool
    padded_experts: int
    stream: int  # that it was made on: once let go, its memory is that stream's again, whoever still reads it
    last: tuple[list[int], Tensor] | None = None  # the addresses of gradients and flags, and their table

    def changing(self, grads: list[Tensor], active: list[Tensor | None]) -> tuple[Tensor, bool]:
        """The table of gradients and flags, int64 [2, items], and whether wide loads may read the gradients."""
        addresses = [grad.data_ptr() for grad in grads]
        aligned = all(address % ALIGNMENT == 0 for address in addresses)
        addresses += [0 if flags is None else flags.data_ptr() for flags in active]
        device = self.table.device
        if self.last is not None and self.last[0] == addresses:
            if capturing(device):
                keep(self.last[1])
            return self.last[1], aligned
        table = upload([addresses[: len(grads)], addresses[len(grads) :]], device)
        if not capturing(device):  # what is allocated under capture belongs to the graph
            self.last = addresses, table
        return table, aligned


_tables: OrderedDict[tuple[object, ...], _Table] = OrderedDict()


def _stream_of(device: torch.device) -> int:
    return 0 if device.type != "cuda" else torch.cuda.current_stream(device).cuda_stream


def _table_of(tensors: AdamWTensors) -> _Table:
    device = tensors.params[0].device
    owners = [0 if owner is None else owner.data_ptr() for owner in tensors.owners]
    columns = [[t.data_ptr() for t in column] for column in (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs)]
    counts = [steps.data_ptr() for steps in tensors.steps]
    sizes = [p.numel() for p in tensors.params]
    experts = [steps.numel() for steps in tensors.steps]
    dtypes = [p.dtype for p in tensors.params]
    key = (device, *owners, *columns[0], *columns[1], *columns[2], *counts, *sizes, *experts, *dtypes)
    known = _tables.get(key)
    stream = _stream_of(device)
    if known is not None and (known.stream == stream or capturing(device)):
        _tables.move_to_end(key)
        if capturing(device):
            keep(known.table)
            keep(known.tickets)
    else:
        number = [max(1, -(-size // BLOCK)) for size in sizes]  # an empty parameter counts its steps too
        first, programs = first_programs(number)
        row_sizes = [
            max(1, size if owner or steps.dim() == 0 else size // steps.numel())
            for size, owner, steps in zip(sizes, owners, tensors.steps, strict=True)
        ]
        codes = [DTYPE_CODES[dtype] for dtype in dtypes]
        table = upload([first, number, sizes, row_sizes, experts, codes, owners, counts, *columns], device)
        aligned = all(value % ALIGNMENT == 0 for column in (owners, sizes, *columns) for value in column)
        known = _Table(
            table,
            torch.zeros(len(sizes), dtype=torch.int32, device=device),
            programs,
            (0 in codes, 1 in codes, 2 in codes),
            aligned,
            max(_FEWEST_EXPERTS, 1 << (max(experts) - 1).bit_length()),
            stream,
        )
        if not capturing(device):
            _tables[key] = known
            if len(_tables) > _MOST_TABLES:
                _tables.popitem(last=False)
    return known
