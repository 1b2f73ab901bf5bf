"""The backward kernel over tokens: the gradient of x, and what the weight gradients need of each token.

A program owns a tile of tokens, recomputes its bottleneck and pulls the gradient back through the active expert's
entries of ``w_up``. LayerNorm's backward needs no reduction over the columns, since with da the gradient of the
pre-activation and b' the folded bias::

    dx = dout + rstd * (da Wg - c1 - xhat c2),    c1 = da s / d,    c2 = da (z - b') / d

Two [T, r] buffers are left for the kernel over weights: the bottleneck's activation h, and da (times rstd where that
kernel multiplies the raw x). Where units are listed for an expert (`adapter_units`), the rows of its tokens hold those,
in the order of the list, and no more.
"""

# ruff: noqa: SIM102 (branches on constants stand alone, for the compiler to drop)
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.device import (
    NO_EXPERT,
    activate,
    activation_slope,
    down_tile,
    experts_of_tile,
    factor_of,
    folded_tile,
    inside,
    kept_units,
    next_expert,
    project,
    units_of,
    up_tile,
)
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan, Rows
from mosa_kernels.backends.triton.reduce import clear_arrivals


@triton.jit
def pull_back(
    grad, grad_at, rows, w_up, owner_up, units, e, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradient of the bottleneck's output, scale * dout w_up_e, zero in other rows: float32 [BLOCK_T, BLOCK_R]."""
    gain = scale
    if owner_up is not None:
        gain = scale * factor_of(e, expert_scale, merged_scale)
    dh = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = rows[:, None] & inside(cols, D, BLOCK_D)[None, :]
        dout = tl.load(grad + (grad_at[:, None] + cols[None, :]), mask=mask, other=0).to(DTYPE)
        w = up_tile(w_up, owner_up, units, cols, e, D, R, BLOCK_R, BLOCK_D, DTYPE)
        dh = tl.dot(dout, w, dh, input_precision=PRECISION)
    return dh * gain


@triton.jit
def recompute(
    x, row_at, rows, token_mean, token_rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e,
    expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, CENTRE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The bottleneck before its bias [BLOCK_T, BLOCK_R], the folded bias and the row sums of Wg [BLOCK_R]."""
    NORM: tl.constexpr = gamma is not None
    z, s, bias, _, _ = project(
        x, row_at, rows, token_mean, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e,
        factor_of(e, expert_scale, merged_scale),
        D, R, CENTRE and NORM, False, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    if NORM:
        if not CENTRE:
            z = z - token_mean[:, None] * s[None, :]
        z = token_rstd[:, None] * z
    return z, bias, s


@triton.jit
def activation_gradient(
    z, bias, dh, tokens, rows, units, seed, seed_id, seed_group, threshold, keep_scale,
    R: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The bottleneck's output h, and da from the gradient of h: float32 [BLOCK_T, BLOCK_R]."""
    h = activate(z + bias[None, :], ACTIVATION)
    da = dh * activation_slope(z + bias[None, :], ACTIVATION)
    if DROPOUT:
        kept = kept_units(tokens, rows, units, seed, seed_id, seed_group, threshold, R)
        h = tl.where(kept, h * keep_scale, 0.0)
        da = tl.where(kept, da * keep_scale, 0.0)
    return h, da


@triton.jit
def norm_terms(da, s, z, D: tl.constexpr):
    """c1 and c2 [BLOCK_T], from the rounded da, so that what LayerNorm projects out is gone exactly."""
    rounded = da.to(tl.float32)
    return tl.sum(rounded * s[None, :], 1) * (1.0 / D), tl.sum(rounded * z, 1) * (1.0 / D)


@triton.jit
def finish(
    z, bias, s, dh, x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, rows, token_mean, token_rstd,
    w_down, owner_down, w_down_init, gamma, seed, units, e, expert_scale, merged_scale, seed_id, seed_group, threshold,
    keep_scale,
    D: tl.constexpr, R: tl.constexpr, H_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr,
    DROPOUT: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores h, da and the gradient of x for the given rows."""
    h, da = activation_gradient(
        z, bias, dh, tokens, rows, units, seed, seed_id, seed_group, threshold, keep_scale, R, ACTIVATION, DROPOUT
    )
    if h_out is not None:
        at = tokens.to(tl.int64)[:, None] * H_STRIDE + tl.arange(0, BLOCK_R)[None, :]
        tl.store(h_out + at, h.to(DTYPE), mask=rows[:, None])
        da_out = h_out + num_tokens.to(tl.int64) * H_STRIDE
        if RAW:
            tl.store(da_out + at, (da * token_rstd[:, None]).to(DTYPE), mask=rows[:, None])
        else:
            tl.store(da_out + at, da.to(DTYPE), mask=rows[:, None])
    if dx is not None:
        operand = da.to(DTYPE)
        if gamma is not None:
            c1, c2 = norm_terms(operand, s, z, D)
        factor = factor_of(e, expert_scale, merged_scale)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            mask = rows[:, None] & inside(cols, D, BLOCK_D)[None, :]
            w = down_tile(w_down, owner_down, w_down_init, units, cols, e, factor, D, R, BLOCK_R, BLOCK_D)
            wg = folded_tile(w, gamma, cols, D, BLOCK_D, DTYPE)
            g = tl.dot(operand, wg, input_precision=PRECISION)
            if gamma is not None:
                tile = tl.load(x + (row_at[:, None] + cols[None, :]), mask=mask, other=0).to(tl.float32)
                xhat = (tile - token_mean[:, None]) * token_rstd[:, None]
                g = token_rstd[:, None] * (g - c1[:, None] - xhat * c2[:, None])
            if ADD_INPUT:
                g += tl.load(grad + (grad_at[:, None] + cols[None, :]), mask=mask, other=0).to(tl.float32)
            tl.store(dx + (dx_at[:, None] + cols[None, :]), g.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def whole_adapter(
    x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, rows, token_mean, token_rstd, w_down, owner_down,
    w_down_init, b_down, w_up, owner_up, gamma, beta, seed, lists, e,
    scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, LISTS: tl.constexpr, H_STRIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_INPUT: tl.constexpr, DROPOUT: tl.constexpr, CENTRE: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Everything for the rows of one expert."""
    units = units_of(lists, e, R, LISTS, BLOCK_R)
    z, bias, s = recompute(
        x, row_at, rows, token_mean, token_rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e,
        expert_scale, merged_scale, D, R, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    dh = pull_back(
        grad, grad_at, rows, w_up, owner_up, units, e, scale, expert_scale, merged_scale,
        D, R, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    finish(
        z, bias, s, dh, x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, rows, token_mean, token_rstd,
        w_down, owner_down, w_down_init, gamma, seed, units, e, expert_scale, merged_scale, seed_id, seed_group,
        threshold, keep_scale,
        D, R, H_STRIDE, ACTIVATION, ADD_INPUT, DROPOUT, RAW, DTYPE, PRECISION, BLOCK_D, BLOCK_R,
    )  # fmt: skip


@triton.jit
def adapter_backward_tokens_kernel(
    x, grad, dx, h_out, mean, rstd, w_down, b_down, w_up, owner_up, owner_down, w_down_init, lists, expert,
    gamma, beta, scale_tensor, seed, parts,
    expert_id, seed_id, num_tokens, expert_group, seed_group, threshold,
    keep_scale, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, LISTS: tl.constexpr, X_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr, GROUPED: tl.constexpr, SERVED: tl.constexpr,
    DROPOUT: tl.constexpr, CENTRE: tl.constexpr, RAW: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, H_STRIDE: tl.constexpr,
    ARRIVALS: tl.constexpr, BLOCK_ARRIVALS: tl.constexpr,
):  # fmt: skip
    if parts is not None:
        if tl.program_id(0) == 0:
            clear_arrivals(parts, ARRIVALS, BLOCK_ARRIVALS)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tokens < num_tokens
    row_at = tokens.to(tl.int64) * X_STRIDE
    grad_at = tokens.to(tl.int64) * GRAD_STRIDE
    dx_at = tokens.to(tl.int64) * D
    if scale_tensor is not None:
        scale = tl.load(scale_tensor).to(tl.float32)
    token_mean = tl.zeros([BLOCK_T], tl.float32)
    token_rstd = tl.full([BLOCK_T], 1.0, tl.float32)
    if gamma is not None:
        token_mean = tl.load(mean + tokens, mask=valid, other=0)
        token_rstd = tl.load(rstd + tokens, mask=valid, other=0)
    ids, e = experts_of_tile(expert, expert_id, tokens, valid, expert_group, GROUPED, SERVED)
    if SERVED == "merged" or (SERVED == "all" and not GROUPED):  # one expert at most
        if True if SERVED == "all" else e < NO_EXPERT:
            whole_adapter(
                x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, valid if SERVED == "all" else ids == e,
                token_mean, token_rstd, w_down, owner_down, w_down_init, b_down, w_up, owner_up, gamma, beta, seed,
                lists, e, scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale,
                D, R, LISTS, H_STRIDE, ACTIVATION, ADD_INPUT, DROPOUT, CENTRE, RAW, DTYPE, PRECISION,
                BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
    elif SERVED == "all" and owner_down is None:  # one bottleneck for all experts
        units = tl.arange(0, BLOCK_R)
        z, bias, s = recompute(
            x, row_at, valid, token_mean, token_rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e,
            expert_scale, merged_scale, D, R, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dh = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        while e < NO_EXPERT:
            dh += pull_back(
                grad, grad_at, ids == e, w_up, owner_up, units, e, scale, expert_scale, merged_scale,
                D, R, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            e = next_expert(ids, e)
        finish(
            z, bias, s, dh, x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, valid, token_mean,
            token_rstd, w_down, owner_down, w_down_init, gamma, seed, units, e, expert_scale, merged_scale, seed_id,
            seed_group, threshold, keep_scale,
            D, R, H_STRIDE, ACTIVATION, ADD_INPUT, DROPOUT, RAW, DTYPE, PRECISION, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    else:
        while e < NO_EXPERT:
            whole_adapter(
                x, row_at, grad, grad_at, dx, dx_at, h_out, num_tokens, tokens, ids == e, token_mean, token_rstd,
                w_down, owner_down, w_down_init, b_down, w_up, owner_up, gamma, beta, seed, lists, e,
                scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale,
                D, R, LISTS, H_STRIDE, ACTIVATION, ADD_INPUT, DROPOUT, CENTRE, RAW, DTYPE, PRECISION,
                BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            e = next_expert(ids, e)


SCALAR_TYPES = ("i32", "i64", "i32", "i32", "i32", "i64", "fp32", "fp32", "fp32", "fp32")


def tokens_launch(
    args: AdapterArguments,
    plan: Plan,
    x: Rows,
    grad: Rows,
    lists: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    h: Tensor | None,
    parts: Parts | None,
    buffer: Tensor | None,
) -> Launch:
    """The launch that fills dx, contiguous, and h and da [2, T, padded r]; either may be None.

    It clears the counters in the buffer of parts for the kernel over weights, where that follows.
    """
    config = plan.configs.tokens
    arrivals = 0 if parts is None else parts.arrivals
    norm = args.norm_weight is not None
    tensors = (
        x.data, grad.data, dx, h, mean if norm else None, rstd if norm else None, args.w_down, args.b_down, args.w_up,
        args.assignment, args.assignment_down, args.w_down_init, lists, args.expert if plan.experts else None,
        args.norm_weight, args.norm_bias, args.scale_tensor, args.seed if args.dropout_p > 0 else None, buffer,
    )  # fmt: skip
    scalars = (
        args.expert_id, args.seed_id, plan.tokens, plan.expert_group, plan.seed_group, plan.threshold,
        plan.keep_scale, args.scale, args.expert_scale, args.merged_scale,
    )  # fmt: skip
    constants = (
        args.width, args.bottleneck, plan.lists, x.stride, grad.stride, args.activation, args.add_input, plan.grouped,
        plan.served,
        args.dropout_p > 0, plan.centre, plan.raw, plan.dtype, plan.precision,
        config.block_t, config.block_d, plan.units, plan.padded_bottleneck,
        arrivals, 1 << (max(arrivals, 1) - 1).bit_length(),
    )  # fmt: skip
    return Launch(
        adapter_backward_tokens_kernel, (-(-plan.tokens // config.block_t), 1, 1), tensors, scalars, SCALAR_TYPES,
        constants, config.num_warps, config.num_stages, dynamic=("expert_id", "seed_id"),
    )  # fmt: skip
