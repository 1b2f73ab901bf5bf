"""The backward kernel over weights: the gradients of both projections, in parts that `reduce` adds up.

A program owns some columns and a run of tokens, and either projection. With G = da^T xhat, summed over its tokens::

    dw_down = G o gamma + db_down (x) beta,    dgamma = sum_k w_down o G,    dbeta = w_down^T db_down
    dw_up   = scale dout^T h,                  dscale = <w_up, dout^T h> + <b_up, sum dout>

in the entries that the tokens' expert owns. Tokens come in runs of one expert: the masks of the experts are disjoint,
so a run's masked product is added to one dense gradient. Every part is written by one program, without atomics.
"""

# ruff: noqa: SIM102 (branches on constants stand alone, for the compiler to drop)
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.device import down_tile, factor_of, inside, up_bias, up_tile
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan, Rows


@triton.jit
def sum_down(
    x, da, mean, rstd, begin, end, cols, norm_weight,
    D: tl.constexpr, X_STRIDE: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """da^T xhat [BLOCK_R, BLOCK_D] and the sum of da [BLOCK_R] over the tokens from begin to end."""
    units = tl.arange(0, BLOCK_R)
    product = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    means = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < end
        mask = valid[:, None] & inside(cols, D, BLOCK_D)[None, :]
        at = tokens.to(tl.int64)[:, None]
        a = tl.load(da + (at * BLOCK_R + units[None, :]), mask=valid[:, None], other=0)
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
    product, bias, w_down, owner_down, w_down_init, gamma, beta, cols, e, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradients of w_down [BLOCK_R, BLOCK_D], gamma and beta [BLOCK_D] from a run of expert e."""
    units = tl.arange(0, BLOCK_R)
    dw = product
    dgamma = tl.zeros([BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)
    factor = factor_of(e, expert_scale, merged_scale)
    mask = inside(cols, D, BLOCK_D)
    if gamma is not None:
        w = down_tile(w_down, owner_down, w_down_init, gamma, units, cols, e, factor, D, R, BLOCK_R, BLOCK_D)
        dgamma += tl.sum(w * product, 0)
        dbeta += tl.sum(w * bias[:, None], 0)
        dw = product * tl.load(gamma + cols, mask=mask, other=0).to(tl.float32)[None, :]
    if beta is not None:
        dw += bias[:, None] * tl.load(beta + cols, mask=mask, other=0).to(tl.float32)[None, :]
    if owner_down is not None:
        at = units[:, None] * D + cols[None, :]
        owner = tl.load(owner_down + at, mask=inside(units, R, BLOCK_R)[:, None] & mask[None, :], other=0)
        dw = tl.where((owner.to(tl.int32) == e) | (e < 0), factor * dw, 0.0)
    return dw, dgamma, dbeta


@triton.jit
def sum_up(
    grad, h, begin, end, cols,
    D: tl.constexpr, GRAD_STRIDE: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dout^T h [BLOCK_D, BLOCK_R] and the sum of dout [BLOCK_D] over the tokens from begin to end."""
    units = tl.arange(0, BLOCK_R)
    product = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    bias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        valid = tokens < end
        at = tokens.to(tl.int64)[:, None]
        mask = valid[:, None] & inside(cols, D, BLOCK_D)[None, :]
        dout = tl.load(grad + (at * GRAD_STRIDE + cols[None, :]), mask=mask, other=0)
        a = tl.load(h + (at * BLOCK_R + units[None, :]), mask=valid[:, None], other=0)
        if BIAS:
            bias += dout.to(tl.float32)
        product = tl.dot(tl.trans(dout.to(DTYPE)), a, product, input_precision=PRECISION)
    return product, tl.sum(bias, 0)


@triton.jit
def up_gradients(
    product, bias, w_up, owner_up, b_up, cols, e, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, NEED_SCALE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of w_up [BLOCK_D, BLOCK_R], b_up [BLOCK_N, BLOCK_D] and the scale from a run of expert e."""
    units = tl.arange(0, BLOCK_R)
    if owner_up is not None:
        at = cols[:, None] * R + units[None, :]
        mask = inside(cols, D, BLOCK_D)[:, None] & inside(units, R, BLOCK_R)[None, :]
        owner = tl.load(owner_up + at, mask=mask, other=0).to(tl.int32)
        factor = factor_of(e, expert_scale, merged_scale)
        product = tl.where((owner == e) | (e < 0), factor * product, 0.0)
    dscale = 0.0
    if NEED_SCALE:
        w = up_tile(w_up, owner_up, units, cols, e, D, R, BLOCK_R, BLOCK_D, DTYPE)
        dscale += tl.sum(tl.sum(w.to(tl.float32) * product, 1), 0)
        if b_up is not None:
            dscale += tl.sum(up_bias(b_up, cols, e, D, N, BLOCK_D) * bias, 0)
    rows = tl.arange(0, BLOCK_N)
    share = tl.where(rows == 0, scale, 0.0)
    if N > 0:
        share = tl.where(e < 0, scale / N, tl.where(rows == e, scale, 0.0))
    return scale * product, share[:, None] * bias[None, :], dscale


@triton.jit
def down_part(
    x, da, mean, rstd, w_down, owner_down, w_down_init, expert, gamma, beta, out,
    begin, end, expert_group, e, expert_scale, merged_scale, column_block,
    D: tl.constexpr, R: tl.constexpr, X_STRIDE: tl.constexpr, GROUPED: tl.constexpr, RAW: tl.constexpr,
    AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_DOWN_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Writes a program's part of the gradients of w_down, b_down, gamma and beta."""
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    units = tl.arange(0, BLOCK_R)
    mask = inside(cols, D, BLOCK_D)
    if GROUPED and owner_down is not None:
        dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        db = tl.zeros([BLOCK_R], tl.float32)
        dgamma = tl.zeros([BLOCK_D], tl.float32)
        dbeta = tl.zeros([BLOCK_D], tl.float32)
        for group in range(begin // expert_group, (end - 1) // expert_group + 1):
            run_e = tl.load(expert + group).to(tl.int32)
            low = tl.maximum(begin, group * expert_group)
            high = tl.minimum(end, (group + 1) * expert_group)
            product, run_db = sum_down(
                x, da, mean, rstd, low, high, cols, gamma,
                D, X_STRIDE, RAW, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            run_dw, run_dgamma, run_dbeta = down_gradients(
                product, run_db, w_down, owner_down, w_down_init, gamma, beta, cols, run_e, expert_scale,
                merged_scale, D, R, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            dw += run_dw
            db += run_db
            dgamma += run_dgamma
            dbeta += run_dbeta
    else:
        product, db = sum_down(
            x, da, mean, rstd, begin, end, cols, gamma,
            D, X_STRIDE, RAW, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dw, dgamma, dbeta = down_gradients(
            product, db, w_down, owner_down, w_down_init, gamma, beta, cols, e, expert_scale, merged_scale,
            D, R, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    at = units[:, None] * D + cols[None, :]
    tl.store(out + at, dw, mask=inside(units, R, BLOCK_R)[:, None] & mask[None, :])
    if gamma is not None:
        tl.store(out + AT_GAMMA + cols, dgamma, mask=mask)
        tl.store(out + AT_BETA + cols, dbeta, mask=mask)
    if column_block == 0:
        tl.store(out + AT_DOWN_BIAS + units, db, mask=inside(units, R, BLOCK_R))


@triton.jit
def up_part(
    grad, h, w_up, b_up, owner_up, expert, out,
    begin, end, expert_group, e, scale, expert_scale, merged_scale, column_block,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, GRAD_STRIDE: tl.constexpr, GROUPED: tl.constexpr,
    NEED_SCALE: tl.constexpr, AT_UP: tl.constexpr, AT_BIAS: tl.constexpr, AT_SCALE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes a program's part of the gradients of w_up, b_up and the scale."""
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    units = tl.arange(0, BLOCK_R)
    rows = tl.arange(0, BLOCK_N)
    mask = inside(cols, D, BLOCK_D)
    BIAS: tl.constexpr = b_up is not None
    if GROUPED:
        dw = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dscale = 0.0
        for group in range(begin // expert_group, (end - 1) // expert_group + 1):
            run_e = tl.load(expert + group).to(tl.int32)
            low = tl.maximum(begin, group * expert_group)
            high = tl.minimum(end, (group + 1) * expert_group)
            product, bias = sum_up(
                grad, h, low, high, cols, D, GRAD_STRIDE, BIAS, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R
            )
            run_dw, run_db, run_dscale = up_gradients(
                product, bias, w_up, owner_up, b_up, cols, run_e, scale, expert_scale, merged_scale,
                D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            dw += run_dw
            db += run_db
            dscale += run_dscale
    else:
        product, bias = sum_up(
            grad, h, begin, end, cols, D, GRAD_STRIDE, BIAS, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R
        )
        dw, db, dscale = up_gradients(
            product, bias, w_up, owner_up, b_up, cols, e, scale, expert_scale, merged_scale,
            D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    at = AT_UP + cols[:, None] * R + units[None, :]
    tl.store(out + at, dw, mask=mask[:, None] & inside(units, R, BLOCK_R)[None, :])
    if BIAS:
        at_bias = AT_BIAS + rows[:, None] * D + cols[None, :]
        tl.store(out + at_bias, db, mask=(rows < max(N, 1))[:, None] & mask[None, :])
    if NEED_SCALE:
        tl.store(out + AT_SCALE + column_block, dscale)


@triton.jit
def adapter_backward_weights_kernel(
    x, grad, h, mean, rstd, w_down, w_up, b_up, owner_up, owner_down, w_down_init, expert, gamma, beta,
    scale_tensor, parts,
    num_tokens, expert_group, expert_id, tokens_a_part,
    scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, X_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    GROUPED: tl.constexpr, RAW: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr, NEED_SCALE: tl.constexpr,
    AT_UP: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_DOWN_BIAS: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_block = tl.program_id(0)
    part = tl.program_id(1)
    begin = part * tokens_a_part
    end = tl.minimum(begin + tokens_a_part, num_tokens)
    out = parts + part * LENGTH
    da = h + num_tokens.to(tl.int64) * BLOCK_R
    if scale_tensor is not None:
        scale = tl.load(scale_tensor).to(tl.float32)
    e = expert_id
    if expert is not None and not GROUPED:
        e = tl.load(expert).to(tl.int32)
    # The last program id chooses the projection; where only one is wanted it has one value.
    if DOWN:
        if tl.program_id(2) == 0:
            down_part(
                x, da, mean, rstd, w_down, owner_down, w_down_init, expert, gamma, beta, out,
                begin, end, expert_group, e, expert_scale, merged_scale, column_block,
                D, R, X_STRIDE, GROUPED, RAW, AT_GAMMA, AT_BETA, AT_DOWN_BIAS, DTYPE, PRECISION,
                BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
    if UP:
        if tl.program_id(2) == tl.num_programs(2) - 1:
            up_part(
                grad, h, w_up, b_up, owner_up, expert, out,
                begin, end, expert_group, e, scale, expert_scale, merged_scale, column_block,
                D, R, N, GRAD_STRIDE, GROUPED, NEED_SCALE, AT_UP, AT_BIAS, AT_SCALE, DTYPE, PRECISION,
                BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_N,
            )  # fmt: skip


SCALAR_TYPES = ("i32", "i32", "i32", "i32", "fp32", "fp32", "fp32")


def weights_launch(
    args: AdapterArguments,
    plan: Plan,
    parts: Parts,
    x: Rows,
    grad: Rows,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    buffer: Tensor,
) -> Launch:
    """The launch that fills the buffer of parts, float32 [number, length], from h and da, [2, T, padded r]."""
    config = plan.configs.weights
    norm = args.norm_weight is not None
    tensors = (
        x.data, grad.data, h, mean if norm else None, rstd if norm else None, args.w_down, args.w_up, args.b_up,
        args.assignment, args.assignment_down, args.w_down_init, args.expert if plan.experts else None,
        args.norm_weight, args.norm_bias, args.scale_tensor, buffer,
    )  # fmt: skip
    scalars = (
        plan.tokens, plan.expert_group, args.expert_id, parts.tokens, args.scale, args.expert_scale,
        args.merged_scale,
    )  # fmt: skip
    constants = (
        args.width, args.bottleneck, plan.bias_rows, x.stride, grad.stride, plan.grouped, plan.raw,
        parts.down, parts.up, parts.scale, *parts.layout, plan.dtype, plan.precision,
        config.block_t, config.block_d, plan.padded_bottleneck, 1 << (max(plan.bias_rows, 1) - 1).bit_length(),
    )  # fmt: skip
    grid = (parts.column_blocks, parts.number, int(parts.down) + int(parts.up))
    return Launch(
        adapter_backward_weights_kernel, grid, tensors, scalars, SCALAR_TYPES, constants,
        config.num_warps, config.num_stages,
    )  # fmt: skip
