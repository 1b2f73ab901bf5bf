"""Sums over runs of tokens and what they give to the gradients of both projections; shared by the backward kernels.

With G = da^T xhat, summed over the tokens of one expert::

    dw_down = G o gamma + db_down (x) beta,    dgamma = sum_k w_down o G,    dbeta = w_down^T db_down
    dw_up   = scale dout^T h,                  dscale = <w_up, dout^T h> + <b_up, sum dout>

in the entries that the expert owns, zero elsewhere.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from mosa_kernels.backends.triton.device import down_tile, existing, factor_of, inside, up_bias, up_tile


@triton.jit
def sum_down(
    x, da, mean, rstd, begin, end, cols, at_units, norm_weight,
    D: tl.constexpr, X_STRIDE: tl.constexpr, H_STRIDE: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """da^T xhat [BLOCK_R, BLOCK_D] and the sum of da [BLOCK_R] over the tokens from begin to end.

    `at_units`: where in a row of da the units stand, int32 [BLOCK_R].
    """
    product = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    means = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < end
        mask = valid[:, None] & inside(cols, D, BLOCK_D)[None, :]
        at = tokens.to(tl.int64)[:, None]
        a = tl.load(da + (at * H_STRIDE + at_units[None, :]), mask=valid[:, None], other=0)
        tile = tl.load(x + (at * X_STRIDE + cols[None, :]), mask=mask, other=0)
        if norm_weight is not None:
            token_mean = tl.load(mean + tokens, mask=valid, other=0)[:, None]
            token_rstd = tl.load(rstd + tokens, mask=valid, other=1)[:, None]
        if RAW:  # a is da rstd
            means += a.to(tl.float32) * token_mean
            bias += a.to(tl.float32) / token_rstd
        else:
            bias += a.to(tl.float32)
            if norm_weight is not None:
                tile = tl.where(mask, (tile.to(tl.float32) - token_mean) * token_rstd, 0.0)
        product = tl.dot(tl.trans(a), tile.to(DTYPE), product, input_precision=PRECISION)
    if RAW:
        product -= tl.sum(means, 0)[:, None]
    return product, tl.sum(bias, 0)


@triton.jit
def down_gradients(
    product, bias, w_down, owner_down, w_down_init, gamma, beta, cols, units, e, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of w_down [BLOCK_R, BLOCK_D], gamma and beta [BLOCK_D] from a run of expert e."""
    dw = product
    dgamma = tl.zeros([BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)
    factor = factor_of(e, expert_scale, merged_scale)
    mask = inside(cols, D, BLOCK_D)
    if gamma is not None:
        w = down_tile(w_down, owner_down, w_down_init, units, cols, e, factor, D, R, BLOCK_R, BLOCK_D)
        dgamma += tl.sum(w * product, 0)
        dbeta += tl.sum(w * bias[:, None], 0)
        dw = product * tl.load(gamma + cols, mask=mask, other=0).to(tl.float32)[None, :]
    if beta is not None:
        dw += bias[:, None] * tl.load(beta + cols, mask=mask, other=0).to(tl.float32)[None, :]
    if owner_down is not None:
        at = units[:, None] * D + cols[None, :]
        owner = tl.load(owner_down + at, mask=existing(units, R, BLOCK_R)[:, None] & mask[None, :], other=0)
        dw = tl.where((owner.to(tl.int32) == e) | (e < 0), factor * dw, 0.0)
    return dw, dgamma, dbeta


@triton.jit
def sum_up(
    grad, h, begin, end, cols, at_units,
    D: tl.constexpr, GRAD_STRIDE: tl.constexpr, H_STRIDE: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dout^T h [BLOCK_D, BLOCK_R] and the sum of dout [BLOCK_D] over the tokens from begin to end."""
    product = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    bias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < end
        at = tokens.to(tl.int64)[:, None]
        mask = valid[:, None] & inside(cols, D, BLOCK_D)[None, :]
        dout = tl.load(grad + (at * GRAD_STRIDE + cols[None, :]), mask=mask, other=0)
        a = tl.load(h + (at * H_STRIDE + at_units[None, :]), mask=valid[:, None], other=0)
        if BIAS:
            bias += dout.to(tl.float32)
        product = tl.dot(tl.trans(dout.to(DTYPE)), a, product, input_precision=PRECISION)
    return product, tl.sum(bias, 0)


@triton.jit
def up_gradients(
    product, bias, w_up, owner_up, b_up, cols, units, e, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NEED_SCALE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of w_up [BLOCK_D, BLOCK_R], b_up [BLOCK_N, BLOCK_D] and the scale from a run of expert e."""
    if owner_up is not None:
        at = cols[:, None] * R + units[None, :]
        mask = inside(cols, D, BLOCK_D)[:, None] & existing(units, R, BLOCK_R)[None, :]
        owner = tl.load(owner_up + at, mask=mask, other=0).to(tl.int32)
        factor = factor_of(e, expert_scale, merged_scale)
        product = tl.where((owner == e) | (e < 0), factor * product, 0.0)
    dscale = 0.0
    if NEED_SCALE:
        w = up_tile(w_up, owner_up, units, cols, e, D, R, BLOCK_R, BLOCK_D, DTYPE)
        dscale += tl.sum(w.to(tl.float32) * product)
        if b_up is not None:
            dscale += tl.sum(up_bias(b_up, cols, e, D, N, BLOCK_D) * bias, 0)
    rows = tl.arange(0, BLOCK_N)
    share = tl.where(rows == 0, scale, 0.0)
    if N > 0:
        share = tl.where(e < 0, scale / N, tl.where(rows == e, scale, 0.0))
    return scale * product, share[:, None] * bias[None, :], dscale
