"""What the kernels share: activations, dropout, the experts and units of a tile, and the tiles of a projection.

*Units* are those of the bottleneck that a kernel multiplies: all of them, in order, or those that an expert owns
anything of (see `adapter_units`). Lists of units are filled up with R, which is none.
"""

# ruff: noqa: RET505 (after a branch on a constant the compiler needs the other branch spelled out)
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

NO_EXPERT = tl.constexpr(1 << 30)  # larger than any expert id


@triton.jit
def inside(index, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """Which indices are below the limit; a constant, so that loads lose their mask, where blocks divide the limit."""
    if LIMIT % BLOCK == 0:
        return tl.full(index.shape, 1, tl.int1)
    else:
        return index < LIMIT


@triton.jit
def existing(units, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Which of the units exist; a constant where they are all of them without padding. Lists are shorter than R."""
    if R == BLOCK_R:
        return tl.full(units.shape, 1, tl.int1)
    else:
        return units < R


@triton.jit
def units_of(lists, e, R: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The units of expert e: int32 [BLOCK_R]. An expert beyond the lists owns none."""
    if lists is None:
        return tl.arange(0, BLOCK_R)
    else:
        at = e * BLOCK_R + tl.arange(0, BLOCK_R)
        return tl.load(lists + at, mask=at < EXPERTS * BLOCK_R, other=R).to(tl.int32)


@triton.jit
def experts_of_tile(expert, expert_id, tokens, valid, expert_group, GROUPED: tl.constexpr, SERVED: tl.constexpr):
    """The expert of each token, int32 [BLOCK_T], NO_EXPERT where the launch does not serve it; the smallest of them.

    Where one expert has all tokens and is served (not GROUPED, SERVED "all") the first result means nothing.
    """
    ids = tokens
    e = expert_id
    if GROUPED:
        ids = tl.load(expert + tokens // expert_group, mask=valid, other=0).to(tl.int32)
    elif expert is not None:
        e = tl.load(expert).to(tl.int32)
    if GROUPED or SERVED != "all":
        if not GROUPED:
            ids = tl.zeros_like(tokens) + e
        served = valid
        if SERVED == "experts":
            served = valid & (ids >= 0)
        elif SERVED == "merged":
            served = valid & (ids < 0)
        ids = tl.where(served, ids, NO_EXPERT)
        e = tl.min(ids, 0)
    return ids, e


@triton.jit
def next_expert(ids, e):
    """The smallest id above e, or NO_EXPERT."""
    return tl.min(tl.where(ids > e, ids, NO_EXPERT), 0)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return z * tl.sigmoid(z * (1.5957691216057308 + 0.07135481282720187 * z * z))
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # a NaN stays one
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        half = tl.sigmoid(z * (1.5957691216057308 + 0.07135481282720187 * z * z))  # (1 + tanh) / 2
        return half + z * half * (1 - half) * (1.5957691216057308 + 0.2140644384816156 * z * z)
    elif ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        return sigmoid * (1 + z * (1 - sigmoid))
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def hash32(h):
    """`backends.dropout.hash32` on unsigned numbers."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15)) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def kept_units(tokens, rows, units, seed, seed_id, seed_group, threshold, R: tl.constexpr):
    """`backends.dropout.keep_mask` for a tile: int1 [tokens, units], of no meaning for tokens outside `rows`."""
    if seed is None:
        seeds = tl.zeros_like(tokens).to(tl.int64) + seed_id
        local = tokens
    else:
        group = tokens // seed_group
        seeds = tl.load(seed + tl.where(rows, group, 0)).to(tl.int64)
        local = tokens - group * seed_group
    low = seeds.to(tl.uint32)[:, None]
    high = (seeds >> 32).to(tl.uint32)[:, None]
    index = (local[:, None] * R + units[None, :]).to(tl.uint32)
    return hash32(hash32(index + low) ^ high) >= threshold.to(tl.uint32)


@triton.jit
def factor_of(e, expert_scale, merged_scale):
    """What the entries are multiplied with that expert e (-1: merged) sees."""
    return tl.where(e < 0, merged_scale, expert_scale)


@triton.jit
def down_tile(
    w_down, owner_down, w_down_init, units, cols, e, factor,
    D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The down-projection that expert e sees, without LayerNorm's weight: float32 [BLOCK_R, BLOCK_D]."""
    mask = existing(units, R, BLOCK_R)[:, None] & inside(cols, D, BLOCK_D)[None, :]
    at = units[:, None] * D + cols[None, :]
    w = tl.load(w_down + at, mask=mask, other=0).to(tl.float32)
    if owner_down is not None:
        owner = tl.load(owner_down + at, mask=mask, other=0).to(tl.int32)
        rest = tl.load(w_down_init + at, mask=mask, other=0).to(tl.float32)
        gain = tl.where((owner == e) | (e < 0), factor, 0.0)
        w = tl.where(gain == 1, w, rest + gain * (w - rest))
    return w


@triton.jit
def folded_tile(w, gamma, cols, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the down-projection with LayerNorm's weight folded in, as the matrix units multiply it."""
    if gamma is not None:
        w = w * tl.load(gamma + cols, mask=inside(cols, D, BLOCK_D), other=0).to(tl.float32)[None, :]
    return w.to(DTYPE)


@triton.jit
def up_tile(
    w_up, owner_up, units, cols, e,
    D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The up-projection that expert e sees, without its factor: [BLOCK_D, BLOCK_R]."""
    mask = inside(cols, D, BLOCK_D)[:, None] & existing(units, R, BLOCK_R)[None, :]
    at = cols[:, None] * R + units[None, :]
    w = tl.load(w_up + at, mask=mask, other=0).to(DTYPE)
    if owner_up is not None:
        owner = tl.load(owner_up + at, mask=mask, other=0).to(tl.int32)
        w = tl.where((owner == e) | (e < 0), w, 0.0).to(DTYPE)
    return w


@triton.jit
def up_bias(b_up, cols, e, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The up-projection's bias for expert e, the mean over the experts for the merged one: float32 [BLOCK_D]."""
    mask = inside(cols, D, BLOCK_D)
    if N == 0:  # shared by the experts
        return tl.load(b_up + cols, mask=mask, other=0).to(tl.float32)
    else:
        row = tl.maximum(e, 0)
        bias = tl.load(b_up + row * D + cols, mask=cols < tl.where(row < N, D, 0), other=0).to(tl.float32)
        if e < 0:
            for n in range(1, N):
                bias += tl.load(b_up + n * D + cols, mask=mask, other=0).to(tl.float32)
            bias *= 1.0 / N
        return bias


@triton.jit
def project(
    x, row_at, rows, shift, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e, factor,
    D: tl.constexpr, R: tl.constexpr, CENTRE: tl.constexpr, STATISTICS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x Wg^T and everything that turns it into the bottleneck, in one pass over x.

    Args:
        row_at: int64 [BLOCK_T], where the rows of x begin; `rows`: which of them to read.
        shift: float32 [BLOCK_T], near the mean of each row, taken off before sums that would cancel.
        CENTRE: whether the matrix units see x - shift (where x is converted anyway) or x as it lies in memory.
        STATISTICS: whether to gather the sums of x - shift and of its squares.

    Returns:
        x Wg^T [BLOCK_T, BLOCK_R]; s = Wg 1 and the bias b_down + Wd beta [BLOCK_R]; both sums [BLOCK_T]. All float32.
    """
    # Tokens of a wider range than fp16's: a column of 100 000 is one that LayerNorm would have made small.
    WIDER: tl.constexpr = CENTRE and tl.float16 == DTYPE and x.dtype.element_ty != tl.float16
    REACH: tl.constexpr = 16 if WIDER else 1
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    s = tl.zeros([BLOCK_R], tl.float32)
    bias = tl.zeros([BLOCK_R], tl.float32)
    if b_down is not None:
        bias += tl.load(b_down + units, mask=existing(units, R, BLOCK_R), other=0).to(tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = rows[:, None] & inside(cols, D, BLOCK_D)[None, :]
        tile = tl.load(x + (row_at[:, None] + cols[None, :]), mask=mask, other=0)
        w = down_tile(w_down, owner_down, w_down_init, units, cols, e, factor, D, R, BLOCK_R, BLOCK_D)
        wg = folded_tile(w, gamma, cols, D, BLOCK_D, DTYPE)
        if CENTRE or STATISTICS:
            centred = tl.where(mask, tile.to(tl.float32) - shift[:, None], 0.0)
        if STATISTICS:
            total += tl.sum(centred, 1)
            squares += tl.sum(centred * centred, 1)
        if gamma is not None:
            s += tl.sum(wg.to(tl.float32), 1)
        if beta is not None:
            b = tl.load(beta + cols, mask=inside(cols, D, BLOCK_D), other=0).to(tl.float32)
            bias += tl.sum(w * b[None, :], 1)
        if REACH != 1:
            centred *= 1.0 / REACH
        operand = centred.to(DTYPE) if CENTRE else tile.to(DTYPE)
        acc = tl.dot(operand, tl.trans(wg), acc, input_precision=PRECISION)
    return acc * REACH, s, bias, total, squares
