"""Adding up the parts of the weight gradients in a fixed order, so that every run gives the same bits."""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts

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
    parts, w_down, w_up, gamma, beta, b_up, b_down, scale, activity, expert,
    expert_id, number, num_ids,
    SIZE: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    AT_UP: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_DOWN_BIAS: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DOWN_BLOCKS: tl.constexpr, UP_BLOCKS: tl.constexpr, VECTOR_BLOCKS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_SCALE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < DOWN_BLOCKS:
        if w_down is not None:
            index = program * BLOCK + tl.arange(0, BLOCK)
            total = sum_parts(parts, index, index < SIZE, number, LENGTH, BLOCK, AT_ONCE)
            store_slice(w_down, index, total, 0, SIZE)
    elif program < DOWN_BLOCKS + UP_BLOCKS:
        if w_up is not None:
            index = AT_UP + (program - DOWN_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            total = sum_parts(parts, index, index < AT_UP + SIZE, number, LENGTH, BLOCK, AT_ONCE)
            store_slice(w_up, index, total, AT_UP, SIZE)
    elif program < DOWN_BLOCKS + UP_BLOCKS + VECTOR_BLOCKS:
        index = AT_GAMMA + (program - DOWN_BLOCKS - UP_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        total = sum_parts(parts, index, index < AT_SCALE, number, LENGTH, BLOCK, AT_ONCE)
        store_slice(gamma, index, total, AT_GAMMA, D)
        store_slice(beta, index, total, AT_BETA, D)
        store_slice(b_up, index, total, AT_BIAS, AT_DOWN_BIAS - AT_BIAS)
        store_slice(b_down, index, total, AT_DOWN_BIAS, R)
    else:
        if scale is not None:
            columns = LENGTH - AT_SCALE
            at = tl.arange(0, BLOCK_SCALE)
            index = at // columns * LENGTH + AT_SCALE + at % columns
            terms = tl.load(parts + index, mask=at < number * columns, other=0)
            tl.store(scale, tl.sum(terms, 0).to(scale.dtype.element_ty))
        if activity is not None:
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


SCALAR_TYPES = ("i32", "i32", "i32")


def reduce_launch(args: AdapterArguments, parts: Parts, buffer: Tensor, gradients: tuple[Tensor | None, ...]) -> Launch:
    """The launch that writes the gradients of w_down, w_up, gamma, beta, b_up, b_down, scale and activity."""
    assert parts.number * parts.column_blocks <= _MOST_SCALE_PARTS
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
        _BLOCK, _AT_ONCE, _MOST_SCALE_PARTS, 1 << (num_experts - 1).bit_length(),
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
