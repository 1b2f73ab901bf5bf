"""Adding up the parts of the weight gradients in a fixed order, so that every run gives the same bits."""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.device import NO_EXPERT
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan

_BLOCK = 512
_AT_ONCE = 8
_MOST_SCALE_PARTS = 512
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
def store_slice(out, index, total, BEGIN: tl.constexpr, SIZE: tl.constexpr):
    """Stores what belongs to the vector that begins at BEGIN among all vectors."""
    if out is not None:
        at = index - BEGIN
        tl.store(out + at, total.to(out.dtype.element_ty), mask=(at >= 0) & (at < SIZE))


@triton.jit
def reduce_kernel(
    down_parts, up_parts, vector_parts, w_down, w_up, gamma, beta, b_up, b_down, scale, activity, expert,
    count, expert_id, num_ids,
    SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, AT_BETA: tl.constexpr, AT_UP: tl.constexpr,
    AT_DOWN: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DOWN_BLOCKS: tl.constexpr, UP_BLOCKS: tl.constexpr, VECTOR_BLOCKS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < DOWN_BLOCKS:
        if w_down is not None:
            index = program * BLOCK + tl.arange(0, BLOCK)
            total = sum_parts(down_parts, index, index < SIZE, count, SIZE, BLOCK, AT_ONCE)
            tl.store(w_down + index, total.to(w_down.dtype.element_ty), mask=index < SIZE)
    elif program < DOWN_BLOCKS + UP_BLOCKS:
        if w_up is not None:
            index = (program - DOWN_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            total = sum_parts(up_parts, index, index < SIZE, count, SIZE, BLOCK, AT_ONCE)
            tl.store(w_up + index, total.to(w_up.dtype.element_ty), mask=index < SIZE)
    elif program < DOWN_BLOCKS + UP_BLOCKS + VECTOR_BLOCKS:
        index = (program - DOWN_BLOCKS - UP_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        total = sum_parts(vector_parts, index, index < AT_SCALE, count, LENGTH, BLOCK, AT_ONCE)
        store_slice(gamma, index, total, 0, D)
        store_slice(beta, index, total, AT_BETA, D)
        store_slice(b_up, index, total, AT_UP, AT_DOWN - AT_UP)
        store_slice(b_down, index, total, AT_DOWN, R)
    else:
        if scale is not None:
            columns = LENGTH - AT_SCALE
            at = tl.arange(0, BLOCK_SCALE)
            index = at // columns * LENGTH + AT_SCALE + at % columns
            terms = tl.load(vector_parts + index, mask=at < count * columns, other=0)
            tl.store(scale, tl.sum(terms, 0).to(scale.dtype.element_ty))
        if activity is not None:
            n = tl.arange(0, BLOCK_N)
            ran = (n == expert_id) | (expert_id < 0)
            if expert is not None:
                ran = n < 0
                for start in range(0, num_ids, AT_ONCE):
                    at = start + tl.arange(0, AT_ONCE)
                    ids = tl.load(expert + at, mask=at < num_ids, other=NO_EXPERT).to(tl.int32)
                    hits = (ids[:, None] == n[None, :]) | (ids < 0)[:, None]
                    ran = ran | (tl.max(hits.to(tl.int32), 0) > 0)
            tl.store(activity + n, ran.to(tl.float32), mask=n < NUM_EXPERTS)


SCALAR_TYPES = ("i32", "i32", "i32")


def reduce_launch(
    args: AdapterArguments,
    plan: Plan,
    parts: Parts,
    buffers: tuple[Tensor | None, Tensor | None, Tensor],
    gradients: tuple[Tensor | None, ...],
) -> Launch:
    """The launch that writes the gradients of w_down, w_up, gamma, beta, b_up, b_down, scale and activity."""
    assert parts.number * parts.column_blocks <= _MOST_SCALE_PARTS
    w_down, w_up, activity = gradients[0], gradients[1], gradients[-1]
    size = args.width * args.bottleneck
    blocks = (
        -(-size // _BLOCK) if w_down is not None else 0,
        -(-size // _BLOCK) if w_up is not None else 0,
        -(-parts.layout[3] // _BLOCK) if any(g is not None for g in gradients[2:6]) else 0,
    )
    num_experts = activity.numel() if activity is not None else 1
    tensors = (*buffers, *gradients, args.expert if activity is not None else None)
    scalars = (parts.number, args.expert_id, args.expert.numel() if args.expert is not None else 0)
    constants = (
        size, args.width, args.bottleneck, *parts.layout, *blocks, num_experts,
        _BLOCK, _AT_ONCE, _MOST_SCALE_PARTS, 1 << (num_experts - 1).bit_length(),
    )  # fmt: skip
    return Launch(reduce_kernel, (sum(blocks) + 1, 1, 1), tensors, scalars, SCALAR_TYPES, constants, _NUM_WARPS, 1)
