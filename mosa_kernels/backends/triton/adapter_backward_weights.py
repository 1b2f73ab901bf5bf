"""The backward kernel over weights: the gradients of both projections, in parts of some tokens each.

A program owns some columns and a range of tokens, and either projection. Tokens come in runs of one expert: the masks
of the experts are disjoint, so a run's masked product (`adapter_weight_sums`) is added to one dense gradient, in
registers; with lists of units (`adapter_units`) the product has the listed units alone and is added to its rows of the
part in memory. Every part is written by one program. The last program to arrive of those that share columns adds up
their parts in the order of the tokens (`reduce`).
"""

# ruff: noqa: SIM102 (branches on constants stand alone, for the compiler to drop)
# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.adapter_weight_sums import down_gradients, sum_down, sum_up, up_gradients
from mosa_kernels.backends.triton.device import existing, inside, units_of
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan, Rows
from mosa_kernels.backends.triton.pointers import arrives_last
from mosa_kernels.backends.triton.reduce import (
    AT_ONCE,
    MOST_SCALE_PARTS,
    add_up,
    store_activity,
    store_scale,
)

_SUMMED_A_THREAD = 8  # entries of AT_ONCE parts that a thread has under way


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
                x, da, mean, rstd, low, high, cols, units, gamma,
                D, X_STRIDE, BLOCK_R, RAW, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            run_dw, run_dgamma, run_dbeta = down_gradients(
                product, run_db, w_down, owner_down, w_down_init, gamma, beta, cols, units, run_e, expert_scale,
                merged_scale, D, R, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            dw += run_dw
            db += run_db
            dgamma += run_dgamma
            dbeta += run_dbeta
    else:
        product, db = sum_down(
            x, da, mean, rstd, begin, end, cols, units, gamma,
            D, X_STRIDE, BLOCK_R, RAW, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dw, dgamma, dbeta = down_gradients(
            product, db, w_down, owner_down, w_down_init, gamma, beta, cols, units, e, expert_scale, merged_scale,
            D, R, BLOCK_D, BLOCK_R,
        )  # fmt: skip
    at = units[:, None] * D + cols[None, :]
    tl.store(out + at, dw, mask=existing(units, R, BLOCK_R)[:, None] & mask[None, :])
    if gamma is not None:
        tl.store(out + AT_GAMMA + cols, dgamma, mask=mask)
        tl.store(out + AT_BETA + cols, dbeta, mask=mask)
    if column_block == 0:
        tl.store(out + AT_DOWN_BIAS + units, db, mask=existing(units, R, BLOCK_R))


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
                grad, h, low, high, cols, units,
                D, GRAD_STRIDE, BLOCK_R, BIAS, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            run_dw, run_db, run_dscale = up_gradients(
                product, bias, w_up, owner_up, b_up, cols, units, run_e, scale, expert_scale, merged_scale,
                D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            dw += run_dw
            db += run_db
            dscale += run_dscale
    else:
        product, bias = sum_up(
            grad, h, begin, end, cols, units,
            D, GRAD_STRIDE, BLOCK_R, BIAS, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dw, db, dscale = up_gradients(
            product, bias, w_up, owner_up, b_up, cols, units, e, scale, expert_scale, merged_scale,
            D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    at = AT_UP + cols[:, None] * R + units[None, :]
    tl.store(out + at, dw, mask=mask[:, None] & existing(units, R, BLOCK_R)[None, :])
    if BIAS:
        at_bias = AT_BIAS + rows[:, None] * D + cols[None, :]
        tl.store(out + at_bias, db, mask=(rows < max(N, 1))[:, None] & mask[None, :])
    if NEED_SCALE:
        tl.store(out + AT_SCALE + column_block, dscale)


@triton.jit
def down_part_listed(
    x, da, mean, rstd, w_down, owner_down, w_down_init, lists, expert, gamma, beta, out,
    begin, end, expert_group, e, expert_scale, merged_scale, column_block,
    D: tl.constexpr, R: tl.constexpr, LISTS: tl.constexpr, X_STRIDE: tl.constexpr, H_STRIDE: tl.constexpr,
    RAW: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_DOWN_BIAS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`down_part`, BLOCK_R units at a time: an expert's list, or all units of the merged adapter in turn."""
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside(cols, D, BLOCK_D)
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        at = units[:, None] * D + cols[None, :]
        tl.store(out + at, tl.zeros([BLOCK_R, BLOCK_D], tl.float32), mask=(units < R)[:, None] & mask[None, :])
        if column_block == 0:
            tl.store(out + AT_DOWN_BIAS + units, tl.zeros([BLOCK_R], tl.float32), mask=units < R)
    dgamma = tl.zeros([BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)
    for group in range(begin // expert_group, (end - 1) // expert_group + 1):
        run_e = e if expert is None else tl.load(expert + group).to(tl.int32)
        low = tl.maximum(begin, group * expert_group)
        high = tl.minimum(end, (group + 1) * expert_group)
        for first in range(0, tl.where(run_e < 0, R, BLOCK_R), BLOCK_R):
            at_units = first + tl.arange(0, BLOCK_R)
            units = tl.where(run_e < 0, at_units, units_of(lists, tl.maximum(run_e, 0), R, LISTS, BLOCK_R))
            product, run_db = sum_down(
                x, da, mean, rstd, low, high, cols, at_units, gamma,
                D, X_STRIDE, H_STRIDE, RAW, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            run_dw, run_dgamma, run_dbeta = down_gradients(
                product, run_db, w_down, owner_down, w_down_init, gamma, beta, cols, units, run_e, expert_scale,
                merged_scale, D, R, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            dgamma += run_dgamma
            dbeta += run_dbeta
            tl.debug_barrier()  # what another thread has stored before is what is added to
            at = out + (units[:, None] * D + cols[None, :])
            rows = (units < R)[:, None] & mask[None, :]
            tl.store(at, tl.load(at, mask=rows, other=0) + run_dw, mask=rows)
            if column_block == 0:
                at_bias = out + AT_DOWN_BIAS + units
                tl.store(at_bias, tl.load(at_bias, mask=units < R, other=0) + run_db, mask=units < R)
    if gamma is not None:
        tl.store(out + AT_GAMMA + cols, dgamma, mask=mask)
        tl.store(out + AT_BETA + cols, dbeta, mask=mask)


@triton.jit
def up_part_listed(
    grad, h, w_up, b_up, owner_up, lists, expert, out,
    begin, end, expert_group, e, scale, expert_scale, merged_scale, column_block,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    H_STRIDE: tl.constexpr, NEED_SCALE: tl.constexpr, AT_UP: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_SCALE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`up_part`, BLOCK_R units at a time: an expert's list, or all units of the merged adapter in turn."""
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = inside(cols, D, BLOCK_D)
    BIAS: tl.constexpr = b_up is not None
    for first in range(0, R, BLOCK_R):
        units = first + tl.arange(0, BLOCK_R)
        at = AT_UP + cols[:, None] * R + units[None, :]
        tl.store(out + at, tl.zeros([BLOCK_D, BLOCK_R], tl.float32), mask=mask[:, None] & (units < R)[None, :])
    db = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dscale = 0.0
    for group in range(begin // expert_group, (end - 1) // expert_group + 1):
        run_e = e if expert is None else tl.load(expert + group).to(tl.int32)
        low = tl.maximum(begin, group * expert_group)
        high = tl.minimum(end, (group + 1) * expert_group)
        for first in range(0, tl.where(run_e < 0, R, BLOCK_R), BLOCK_R):
            at_units = first + tl.arange(0, BLOCK_R)
            units = tl.where(run_e < 0, at_units, units_of(lists, tl.maximum(run_e, 0), R, LISTS, BLOCK_R))
            product, bias = sum_up(
                grad, h, low, high, cols, at_units,
                D, GRAD_STRIDE, H_STRIDE, BIAS, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            run_dw, run_db, run_dscale = up_gradients(
                product, tl.where(first == 0, bias, 0.0), w_up, owner_up, b_up, cols, units, run_e, scale,
                expert_scale, merged_scale, D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            db += run_db
            dscale += run_dscale
            tl.debug_barrier()  # what another thread has stored before is what is added to
            at = out + (AT_UP + cols[:, None] * R + units[None, :])
            entries = mask[:, None] & (units < R)[None, :]
            tl.store(at, tl.load(at, mask=entries, other=0) + run_dw, mask=entries)
    if BIAS:
        rows = tl.arange(0, BLOCK_N)
        at_bias = AT_BIAS + rows[:, None] * D + cols[None, :]
        tl.store(out + at_bias, db, mask=(rows < max(N, 1))[:, None] & mask[None, :])
    if NEED_SCALE:
        tl.store(out + AT_SCALE + column_block, dscale)


@triton.jit
def adapter_backward_weights_kernel(
    x, grad, h, mean, rstd, w_down, w_up, b_up, owner_up, owner_down, w_down_init, lists, expert, gamma,
    beta, scale_tensor, parts, dw_down, dw_up, dgamma, dbeta, db_up, db_down, dscale, activity,
    expert_id, num_tokens, expert_group, tokens_a_part, num_ids,
    scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, LISTS: tl.constexpr, X_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr, GROUPED: tl.constexpr, RAW: tl.constexpr, DOWN: tl.constexpr, UP: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    AT_UP: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_DOWN_BIAS: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_LIST: tl.constexpr,
    BLOCK_N: tl.constexpr, ARRIVALS: tl.constexpr, SUMMED: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_SCALE: tl.constexpr, NUM_EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    column_block = tl.program_id(0)
    part = tl.program_id(1)
    number = tl.num_programs(1)
    arrivals = parts.to(tl.pointer_type(tl.int32), bitcast=True)
    parts += ARRIVALS
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
            if lists is None:
                down_part(
                    x, da, mean, rstd, w_down, owner_down, w_down_init, expert, gamma, beta, out,
                    begin, end, expert_group, e, expert_scale, merged_scale, column_block,
                    D, R, X_STRIDE, GROUPED, RAW, AT_GAMMA, AT_BETA, AT_DOWN_BIAS, DTYPE, PRECISION,
                    BLOCK_T, BLOCK_D, BLOCK_R,
                )  # fmt: skip
            else:
                down_part_listed(
                    x, da, mean, rstd, w_down, owner_down, w_down_init, lists, expert, gamma, beta, out,
                    begin, end, expert_group, e, expert_scale, merged_scale, column_block,
                    D, R, LISTS, X_STRIDE, BLOCK_R, RAW, AT_GAMMA, AT_BETA, AT_DOWN_BIAS, DTYPE, PRECISION,
                    BLOCK_T, BLOCK_D, BLOCK_LIST,
                )  # fmt: skip
            if arrives_last(arrivals + column_block, number):
                first = column_block * BLOCK_D
                add_up(parts, dw_down, number, first, 0, R, D, BLOCK_D, LENGTH, SUMMED, AT_ONCE)
                add_up(parts, dgamma, number, first, AT_GAMMA, 1, D, BLOCK_D, LENGTH, BLOCK_D, AT_ONCE)
                add_up(parts, dbeta, number, first, AT_BETA, 1, D, BLOCK_D, LENGTH, BLOCK_D, AT_ONCE)
                if column_block == 0:
                    add_up(parts, db_down, number, 0, AT_DOWN_BIAS, 1, R, R, LENGTH, BLOCK_R, AT_ONCE)
    if UP:
        if tl.program_id(2) == tl.num_programs(2) - 1:
            if lists is None:
                up_part(
                    grad, h, w_up, b_up, owner_up, expert, out,
                    begin, end, expert_group, e, scale, expert_scale, merged_scale, column_block,
                    D, R, N, GRAD_STRIDE, GROUPED, NEED_SCALE, AT_UP, AT_BIAS, AT_SCALE, DTYPE, PRECISION,
                    BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_N,
                )  # fmt: skip
            else:
                up_part_listed(
                    grad, h, w_up, b_up, owner_up, lists, expert, out,
                    begin, end, expert_group, e, scale, expert_scale, merged_scale, column_block,
                    D, R, N, LISTS, GRAD_STRIDE, BLOCK_R, NEED_SCALE, AT_UP, AT_BIAS, AT_SCALE, DTYPE, PRECISION,
                    BLOCK_T, BLOCK_D, BLOCK_LIST, BLOCK_N,
                )  # fmt: skip
            if arrives_last(arrivals + tl.num_programs(0) + column_block, number):
                first = column_block * BLOCK_D
                add_up(parts, dw_up, number, first * R, AT_UP, 1, D * R, BLOCK_D * R, LENGTH, SUMMED, AT_ONCE)
                add_up(parts, db_up, number, first, AT_BIAS, max(N, 1), D, BLOCK_D, LENGTH, BLOCK_D, AT_ONCE)
            if NEED_SCALE:
                columns = tl.num_programs(0)
                if arrives_last(arrivals + 2 * columns, number * columns):
                    store_scale(parts, dscale, number, AT_SCALE, LENGTH, BLOCK_SCALE)
    if activity is not None:
        if column_block == 0 and part == 0 and tl.program_id(2) == 0:
            store_activity(activity, expert, expert_id, num_ids, NUM_EXPERTS, AT_ONCE, BLOCK_EXPERTS)


SCALAR_TYPES = ("i32", "i32", "i32", "i32", "i32", "fp32", "fp32", "fp32")


def weights_launch(
    args: AdapterArguments,
    plan: Plan,
    parts: Parts,
    x: Rows,
    grad: Rows,
    lists: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    buffer: Tensor,
    gradients: tuple[Tensor | None, ...],
) -> Launch:
    """The launch that writes all gradients but x's, from h and da [2, T, padded r], by way of the buffer of parts.

    Args:
        buffer: float32 [parts.buffer_size]; its counters are zero.
        gradients: of w_down, w_up, gamma, beta, b_up, b_down, scale and activity; those that are wanted.
    """
    assert parts.number * parts.column_blocks <= MOST_SCALE_PARTS
    config = plan.configs.weights
    activity = gradients[-1]
    expert = args.expert if plan.experts or activity is not None else None
    num_experts = activity.shape[0] if activity is not None else 1
    norm = args.norm_weight is not None
    tensors = (
        x.data, grad.data, h, mean if norm else None, rstd if norm else None, args.w_down, args.w_up, args.b_up,
        args.assignment, args.assignment_down, args.w_down_init, lists, expert,
        args.norm_weight, args.norm_bias, args.scale_tensor, buffer, *gradients,
    )  # fmt: skip
    scalars = (
        args.expert_id, plan.tokens, plan.expert_group, parts.tokens, 0 if expert is None else expert.numel(),
        args.scale, args.expert_scale, args.merged_scale,
    )  # fmt: skip
    constants = (
        args.width, args.bottleneck, plan.bias_rows, plan.lists, x.stride, grad.stride, plan.grouped, plan.raw,
        parts.down, parts.up, parts.scale, *parts.layout, plan.dtype, plan.precision,
        config.block_t, config.block_d, plan.padded_bottleneck, plan.units,
        1 << (max(plan.bias_rows, 1) - 1).bit_length(), parts.arrivals,
        min(_SUMMED_A_THREAD * 32 * config.num_warps, config.block_d * plan.padded_bottleneck), AT_ONCE,
        MOST_SCALE_PARTS, num_experts, 1 << (num_experts - 1).bit_length(),
    )  # fmt: skip
    grid = (parts.column_blocks, parts.number, int(parts.down) + int(parts.up))
    return Launch(
        adapter_backward_weights_kernel, grid, tensors, scalars, SCALAR_TYPES, constants,
        config.num_warps, config.num_stages, dynamic=("expert_id",),
    )  # fmt: skip
