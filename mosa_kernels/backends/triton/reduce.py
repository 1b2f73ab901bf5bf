"""Adding up the parts of the weight gradients in a fixed order, so that every run gives the same bits.

The programs of the kernel over weights that share columns count their arrivals, and the last one adds up what all of
them have written: which one it is differs from run to run, the order of the sum does not. Where one program has all
columns (`adapter_backward_together`), a launch of its own adds up the parts.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts

_BLOCK = 512
AT_ONCE = 8
MOST_SCALE_PARTS = 512
_NUM_WARPS = 4


@triton.jit
def sum_parts(parts, index, mask, count, stride, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sum of parts[0 : count, index]: float32 [BLOCK]."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        at = part[:, None] * stride + index[None, :]
        total += tl.sum(tl.load(parts + at, mask=(part < count)[:, None] & mask[None, :], other=0), 0)
    return total


@triton.jit
def add_up(
    parts, out, number, first,
    AT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Stores the sum over parts of some columns, from the first on, of the matrix [ROWS, WIDTH] that begins at AT."""
    if out is not None:
        for start in range(0, ROWS * COLUMNS, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            column = first + entry % COLUMNS
            at = entry // COLUMNS * WIDTH + column
            mask = (entry < ROWS * COLUMNS) & (column < WIDTH)
            total = sum_parts(parts, AT + at, mask, number, LENGTH, BLOCK, AT_ONCE)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def clear_arrivals(parts, ARRIVALS: tl.constexpr, BLOCK: tl.constexpr):
    """Sets the counters to zero that stand before the parts."""
    at = tl.arange(0, BLOCK)
    tl.store(parts + at, tl.zeros([BLOCK], tl.float32), mask=at < ARRIVALS)


@triton.jit
def store_slice(out, index, total, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    """Stores what belongs to the vector that begins at BEGIN among all vectors."""
    if out is not None:
        at = index - BEGIN
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(at >= 0) & (at < SIZE))


@triton.jit
def store_scale(
    parts, scale, number, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr, BLOCK_SCALE: tl.constexpr
):  # fmt: skip
    """Stores the sum of the scale's gradient over parts and blocks of columns, BLOCK_SCALE of them at most."""
    columns = LENGTH - AT_SCALE
    at = tl.arange(0, BLOCK_SCALE)
    index = at // columns * LENGTH + AT_SCALE + at % columns
    terms = tl.load(parts + index, mask=at < number * columns, other=0)
    tl.store(scale, tl.sum(terms, 0).to(scale.dtype.element_ty))


@triton.jit
def store_activity(
    activity, expert, expert_id, num_ids,
    NUM_EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores which experts ran, float32 [NUM_EXPERTS]: all of them where a merged adapter did."""
    n = tl.arange(0, BLOCK_N)
    ran = (n == expert_id) | (expert_id < 0)
    if expert is not None:
        ran = n < 0
        for start in range(0, num_ids, AT_ONCE):
            at = start + tl.arange(0, AT_ONCE)
            ids = tl.load(expert + at, mask=at < num_ids, other=0).to(tl.int32)
            hits = ((ids[:, None] == n[None, :]) | (ids < 0)[:, None]) & (at < num_ids)[:, None]
            ran = ran | (tl.max(hits.to(tl.int32), 0) > 0)
    tl.store(activity + n, ran.to(tl.float32), mask=n < NUM_EXPERTS)


@triton.jit
def reduce_kernel(
    parts, dw_down, dw_up, dgamma, dbeta, db_up, db_down, dscale, activity, expert,
    expert_id, number, num_ids,
    SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    AT_UP: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_DOWN_BIAS: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DOWN_BLOCKS: tl.constexpr, UP_BLOCKS: tl.constexpr, VECTOR_BLOCKS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < DOWN_BLOCKS:
        add_up(parts, dw_down, number, program * BLOCK, 0, 1, SIZE, BLOCK, LENGTH, BLOCK, AT_ONCE)
    elif program < DOWN_BLOCKS + UP_BLOCKS:
        first = (program - DOWN_BLOCKS) * BLOCK
        add_up(parts, dw_up, number, first, AT_UP, 1, SIZE, BLOCK, LENGTH, BLOCK, AT_ONCE)
    elif program < DOWN_BLOCKS + UP_BLOCKS + VECTOR_BLOCKS:
        index = AT_GAMMA + (program - DOWN_BLOCKS - UP_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        total = sum_parts(parts, index, index < AT_SCALE, number, LENGTH, BLOCK, AT_ONCE)
        store_slice(dgamma, index, total, AT_GAMMA, D)
        store_slice(dbeta, index, total, AT_BETA, D)
        store_slice(db_up, index, total, AT_BIAS, AT_DOWN_BIAS - AT_BIAS)
        store_slice(db_down, index, total, AT_DOWN_BIAS, R)
    else:
        if dscale is not None:
            store_scale(parts, dscale, number, AT_SCALE, LENGTH, BLOCK_SCALE)
        if activity is not None:
            store_activity(activity, expert, expert_id, num_ids, NUM_EXPERTS, AT_ONCE, BLOCK_N)


SCALAR_TYPES = ("i32", "i32", "i32")


def reduce_launch(args: AdapterArguments, parts: Parts, buffer: Tensor, gradients: tuple[Tensor | None, ...]) -> Launch:
    """The launch that writes the gradients of w_down, w_up, gamma, beta, b_up, b_down, scale and activity.

    Of the parts that `adapter_backward_together` leaves.
    """
    assert parts.number * parts.column_blocks <= MOST_SCALE_PARTS
    w_down, w_up, activity = gradients[0], gradients[1], gradients[-1]
    size = args.width * args.bottleneck
    _, at_gamma, *_, at_scale, _ = parts.layout
    blocks = (
        -(-size // _BLOCK) if w_down is not None else 0,
        -(-size // _BLOCK) if w_up is not None else 0,
        -(-(at_scale - at_gamma) // _BLOCK),
    )
    num_experts = activity.shape[0] if activity is not None else 1
    tensors = (buffer, *gradients, args.expert if activity is not None else None)
    scalars = (args.expert_id, parts.number, args.expert.numel() if args.expert is not None else 0)
    constants = (
        size, args.width, args.bottleneck, *parts.layout, *blocks, num_experts,
        _BLOCK, AT_ONCE, MOST_SCALE_PARTS, 1 << (num_experts - 1).bit_length(),
    )  # fmt: skip
    return Launch(
        reduce_kernel,
        (sum(blocks) + 1, 1, 1),
        tensors,
        scalars,
        SCALAR_TYPES,
        constants,
        _NUM_WARPS,
        1,
        dynamic=("expert_id",),
    )
