"""The forward pass of the adapter in one launch (arXiv 2312.02923, Eq. 1, 2 and 5).

A program owns a tile of tokens. Its first pass over their columns computes ``x Wg^T`` with ``Wg = gamma o w_down`` on
the raw x and gathers LayerNorm's statistics beside it, since::

    LayerNorm(x) w_down^T = rstd (x Wg^T - mean s) + w_down beta,    s = Wg 1

The bottleneck stays in registers. The second pass multiplies it with the entries of ``w_up`` that the tile's expert
owns, the owner's byte being compared on the loaded tile, and adds bias, x and residual. A tile with tokens of several
experts repeats the second pass for each, storing that expert's rows. With lists of units (`adapter_units`), both
passes take the listed units alone, and both are repeated.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.adapter_calls import Call, call_like, warms_up
from mosa_kernels.backends.triton.adapter_units import lists_for
from mosa_kernels.backends.triton.device import (
    NO_EXPERT,
    activate,
    experts_of_tile,
    factor_of,
    inside,
    kept_units,
    next_expert,
    project,
    units_of,
    up_bias,
    up_tile,
)
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Plan, Rows, architecture, plans_of, rows_of


@triton.jit
def bottleneck(
    x, row_at, tokens, rows, mean, rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, seed, units, e,
    expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
    D: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr, CENTRE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dropout(act(LayerNorm(x) w_down^T + b_down)) as the second product takes it; stores mean and rstd."""
    NORM: tl.constexpr = gamma is not None
    shift = tl.zeros([BLOCK_T], tl.float32)
    if NORM:
        cols = tl.arange(0, BLOCK_D)
        mask = rows[:, None] & inside(cols, D, BLOCK_D)[None, :]
        first = tl.load(x + (row_at[:, None] + cols[None, :]), mask=mask, other=0).to(tl.float32)
        shift = tl.sum(first, 1) * (1.0 / min(BLOCK_D, D))
    factor = factor_of(e, expert_scale, merged_scale)
    z, s, bias, total, squares = project(
        x, row_at, rows, shift, w_down, owner_down, w_down_init, b_down, gamma, beta, units, e, factor,
        D, R, CENTRE and NORM, NORM, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    if NORM:
        offset = total * (1.0 / D)
        scatter = tl.maximum(squares * (1.0 / D) - offset * offset, 0.0)
        token_rstd = 1 / tl.sqrt(scatter + eps)
        token_mean = shift + offset
        tl.store(mean + tokens, token_mean, mask=rows)
        tl.store(rstd + tokens, token_rstd, mask=rows)
        seen = offset if CENTRE else token_mean
        z = token_rstd[:, None] * (z - seen[:, None] * s[None, :])
    h = activate(z + bias[None, :], ACTIVATION)
    if DROPOUT:
        kept = kept_units(tokens, rows, units, seed, seed_id, seed_group, threshold, R)
        h = tl.where(kept, h * keep_scale, 0.0)
    return h.to(DTYPE)


@triton.jit
def write_output(
    h, x, row_at, residual, residual_at, out, out_at, rows, w_up, owner_up, b_up, units, e, scale, expert_scale,
    merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ADD_INPUT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[x] + [residual] + scale * (h w_up_e^T + b_up_e) for the rows of expert e."""
    gain = scale
    if owner_up is not None:
        gain = scale * factor_of(e, expert_scale, merged_scale)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = rows[:, None] & inside(cols, D, BLOCK_D)[None, :]
        w = up_tile(w_up, owner_up, units, cols, e, D, R, BLOCK_R, BLOCK_D, DTYPE)
        y = tl.dot(h, tl.trans(w), input_precision=PRECISION) * gain
        if b_up is not None:
            y += (scale * up_bias(b_up, cols, e, D, N, BLOCK_D))[None, :]
        if ADD_INPUT:
            y += tl.load(x + (row_at[:, None] + cols[None, :]), mask=mask, other=0).to(tl.float32)
        if residual is not None:
            y += tl.load(residual + (residual_at[:, None] + cols[None, :]), mask=mask, other=0).to(tl.float32)
        tl.store(out + (out_at[:, None] + cols[None, :]), y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def whole_adapter(
    x, row_at, residual, residual_at, out, out_at, tokens, rows, mean, rstd, w_down, owner_down, w_down_init, b_down,
    w_up, owner_up, b_up, gamma, beta, seed, lists, e,
    scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, ACTIVATION: tl.constexpr,
    ADD_INPUT: tl.constexpr, DROPOUT: tl.constexpr, CENTRE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both passes over the rows of one expert."""
    units = units_of(lists, e, R, LISTS, BLOCK_R)
    h = bottleneck(
        x, row_at, tokens, rows, mean, rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, seed, units, e,
        expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
        D, R, ACTIVATION, DROPOUT, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
    )  # fmt: skip
    write_output(
        h, x, row_at, residual, residual_at, out, out_at, rows, w_up, owner_up, b_up, units, e, scale, expert_scale,
        merged_scale, D, R, N, ADD_INPUT, DTYPE, PRECISION, BLOCK_D, BLOCK_R,
    )  # fmt: skip


@triton.jit
def adapter_forward_kernel(
    x, residual, out, mean, rstd, w_down, b_down, w_up, b_up, owner_up, owner_down, w_down_init, lists, expert, gamma,
    beta, scale_tensor, seed,
    expert_id, seed_id, num_tokens, expert_group, seed_group, threshold,
    keep_scale, eps, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr, GROUPED: tl.constexpr, SERVED: tl.constexpr,
    DROPOUT: tl.constexpr, CENTRE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = tokens < num_tokens
    row_at = tokens.to(tl.int64) * X_STRIDE
    residual_at = tokens.to(tl.int64) * RESIDUAL_STRIDE
    out_at = tokens.to(tl.int64) * D
    if scale_tensor is not None:
        scale = tl.load(scale_tensor).to(tl.float32)
    ids, e = experts_of_tile(expert, expert_id, tokens, valid, expert_group, GROUPED, SERVED)
    if SERVED == "merged" or (SERVED == "all" and not GROUPED):  # one expert at most
        if True if SERVED == "all" else e < NO_EXPERT:
            whole_adapter(
                x, row_at, residual, residual_at, out, out_at, tokens, valid if SERVED == "all" else ids == e, mean,
                rstd, w_down, owner_down, w_down_init, b_down, w_up, owner_up, b_up, gamma, beta, seed, lists, e,
                scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
                D, R, N, LISTS, ACTIVATION, ADD_INPUT, DROPOUT, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
    elif SERVED == "all" and owner_down is None:  # one bottleneck for all experts
        units = tl.arange(0, BLOCK_R)
        h = bottleneck(
            x, row_at, tokens, valid, mean, rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, seed, units, e,
            expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
            D, R, ACTIVATION, DROPOUT, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        while e < NO_EXPERT:
            write_output(
                h, x, row_at, residual, residual_at, out, out_at, ids == e, w_up, owner_up, b_up, units, e, scale,
                expert_scale, merged_scale, D, R, N, ADD_INPUT, DTYPE, PRECISION, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            e = next_expert(ids, e)
    else:
        while e < NO_EXPERT:
            whole_adapter(
                x, row_at, residual, residual_at, out, out_at, tokens, ids == e, mean, rstd, w_down, owner_down,
                w_down_init, b_down, w_up, owner_up, b_up, gamma, beta, seed, lists, e,
                scale, expert_scale, merged_scale, seed_id, seed_group, threshold, keep_scale, eps,
                D, R, N, LISTS, ACTIVATION, ADD_INPUT, DROPOUT, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            e = next_expert(ids, e)


SCALAR_TYPES = ("i32", "i64", "i32", "i32", "i32", "i64", "fp32", "fp32", "fp32", "fp32", "fp32")


def forward_launch(
    args: AdapterArguments,
    plan: Plan,
    x: Rows,
    residual: Rows | None,
    lists: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Launch:
    """The launch that fills out, like x but contiguous, and mean and rstd [T]."""
    config = plan.configs.forward
    norm = args.norm_weight is not None
    summand, summand_stride = (None, args.width) if residual is None else residual
    tensors = (
        x.data, summand, out, mean if norm else None, rstd if norm else None, args.w_down, args.b_down, args.w_up,
        args.b_up, args.assignment, args.assignment_down, args.w_down_init, lists,
        args.expert if plan.experts else None, args.norm_weight, args.norm_bias, args.scale_tensor,
        args.seed if args.dropout_p > 0 else None,
    )  # fmt: skip
    scalars = (
        args.expert_id, args.seed_id, plan.tokens, plan.expert_group, plan.seed_group, plan.threshold,
        plan.keep_scale, args.norm_eps, args.scale, args.expert_scale, args.merged_scale,
    )  # fmt: skip
    constants = (
        args.width, args.bottleneck, plan.bias_rows, plan.lists, x.stride, summand_stride,
        args.activation, args.add_input, plan.grouped, plan.served, args.dropout_p > 0,
        plan.centre, plan.dtype, plan.precision,
        config.block_t, config.block_d, plan.units,
    )  # fmt: skip
    grid = (-(-plan.tokens // config.block_t), 1, 1)
    return Launch(
        adapter_forward_kernel, grid, tensors, scalars, SCALAR_TYPES, constants, config.num_warps, config.num_stages,
        dynamic=("expert_id", "seed_id"),
    )  # fmt: skip


def _call(args: AdapterArguments, lists: Tensor | None, *_: int | None) -> Call:
    return Call(plans_of(args, architecture(args.x.device), lists))


def _launches(
    call: Call, args: AdapterArguments, tensors: Sequence[Tensor], x_stride: int, residual_stride: int | None
) -> list[Launch]:
    x, summand, lists, out, mean, rstd = tensors
    residual = None if residual_stride is None else Rows(summand, residual_stride)
    return [
        forward_launch(args, plan, Rows(x, x_stride), residual, lists if plan.lists else None, out, mean, rstd)
        for plan in call.plans
    ]


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output like x, contiguous; LayerNorm's mean and rstd, float32 [T], or [0] without a norm.

    One launch; with lists of units and ids in device memory a second one for merged tokens.
    """
    x, x_stride = rows_of(args.x)
    summand, stride = (None, None) if args.residual is None else rows_of(args.residual)
    lists = lists_for(args)
    call = call_like("forward", args, lists, (x_stride, stride), _call)
    out = torch.empty_like(args.x, memory_format=torch.contiguous_format)
    mean = torch.empty(
        call.plans[0].tokens if args.norm_weight is not None else 0, dtype=torch.float32, device=x.device
    )
    rstd = torch.empty_like(mean)
    call.run(args, (x, summand, lists, out, mean, rstd), _launches, x_stride, stride)
    if warms_up(lists):
        captured = call_like("forward", args, None, (x_stride, stride), _call)
        captured.prepare(args, (x, summand, None, out, mean, rstd), _launches, x_stride, stride)
    return out, mean, rstd
