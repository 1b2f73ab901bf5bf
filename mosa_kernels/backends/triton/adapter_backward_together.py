"""The backward pass over tokens and weights in one launch, for narrow bottlenecks.

A program owns a range of tokens. For each tile of them it recomputes the bottleneck, writes the gradient of x, and adds
the tile's weight gradients to its own part, which stays in the L2 cache: x and dout leave device memory once where two
launches read them twice, and neither h nor da is ever written. `reduce` adds up the parts. Bytes through device memory,
with A those of x and P programs: 3A + 16 P r d, against 5A + 8 T r and the parts of fewer programs.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton.adapter_backward_tokens import (
    activation_gradient,
    norm_terms,
    pull_back,
    recompute,
)
from mosa_kernels.backends.triton.adapter_weight_sums import down_gradients, up_gradients
from mosa_kernels.backends.triton.device import down_tile, existing, factor_of, folded_tile, inside
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Parts, Plan, Rows

_CLEARED = 1024  # entries of a part that are set to zero at a time


@triton.jit
def add_to(out, value, mask):
    """out += value, where no other program writes."""
    tl.store(out, tl.load(out, mask=mask, other=0) + value, mask=mask)


@triton.jit
def adapter_backward_together_kernel(
    x, grad, dx, mean, rstd, w_down, b_down, w_up, b_up, owner_up, owner_down, w_down_init, expert, gamma, beta,
    scale_tensor, seed, parts,
    expert_id, seed_id, num_tokens, expert_group, tokens_a_part, seed_group, threshold,
    keep_scale, scale, expert_scale, merged_scale,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, X_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr, DROPOUT: tl.constexpr, CENTRE: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    AT_UP: tl.constexpr, AT_GAMMA: tl.constexpr, AT_BETA: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_DOWN_BIAS: tl.constexpr, AT_SCALE: tl.constexpr, LENGTH: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    CLEARED: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    begin = part * tokens_a_part
    end = tl.minimum(begin + tokens_a_part, num_tokens)
    out = parts + part * LENGTH
    for first in range(0, LENGTH, CLEARED):
        at = first + tl.arange(0, CLEARED)
        tl.store(out + at, tl.zeros([CLEARED], tl.float32), mask=at < LENGTH)
    if scale_tensor is not None:
        scale = tl.load(scale_tensor).to(tl.float32)
    units = tl.arange(0, BLOCK_R)
    here = existing(units, R, BLOCK_R)
    bias_rows = tl.arange(0, BLOCK_N)
    dscale = 0.0
    for group in range(begin // expert_group, (end - 1) // expert_group + 1):
        e = expert_id if expert is None else tl.load(expert + group).to(tl.int32)
        factor = factor_of(e, expert_scale, merged_scale)
        low = tl.maximum(begin, group * expert_group)
        high = tl.minimum(end, (group + 1) * expert_group)
        for start in range(low, high, BLOCK_T):
            tokens = start + tl.arange(0, BLOCK_T)
            rows = tokens < high
            row_at = tokens.to(tl.int64) * X_STRIDE
            grad_at = tokens.to(tl.int64) * GRAD_STRIDE
            dx_at = tokens.to(tl.int64) * D
            token_mean = tl.zeros([BLOCK_T], tl.float32)
            token_rstd = tl.full([BLOCK_T], 1.0, tl.float32)
            if gamma is not None:
                token_mean = tl.load(mean + tokens, mask=rows, other=0)
                token_rstd = tl.load(rstd + tokens, mask=rows, other=0)
            z, bias, s = recompute(
                x, row_at, rows, token_mean, token_rstd, w_down, owner_down, w_down_init, b_down, gamma, beta, units,
                e, expert_scale, merged_scale, D, R, CENTRE, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            dh = pull_back(
                grad, grad_at, rows, w_up, owner_up, units, e, scale, expert_scale, merged_scale,
                D, R, DTYPE, PRECISION, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            h, da = activation_gradient(
                z,
                bias,
                dh,
                tokens,
                rows,
                units,
                seed,
                seed_id,
                seed_group,
                threshold,
                keep_scale,
                R,
                ACTIVATION,
                DROPOUT,
            )
            h = tl.where(rows[:, None], h, 0.0).to(DTYPE)
            da = tl.where(rows[:, None], da, 0.0)
            db_down = tl.sum(da, 0)
            da = da.to(DTYPE)
            if gamma is not None:
                c1, c2 = norm_terms(da, s, z, D)
            tl.debug_barrier()  # what another thread has stored before is what is added to
            add_to(out + AT_DOWN_BIAS + units, db_down, here)
            for first in range(0, D, BLOCK_D):
                cols = first + tl.arange(0, BLOCK_D)
                real = inside(cols, D, BLOCK_D)
                mask = rows[:, None] & real[None, :]
                tile = tl.load(x + (row_at[:, None] + cols[None, :]), mask=mask, other=0)
                dout = tl.load(grad + (grad_at[:, None] + cols[None, :]), mask=mask, other=0)
                w = down_tile(w_down, owner_down, w_down_init, units, cols, e, factor, D, R, BLOCK_R, BLOCK_D)
                g = tl.dot(da, folded_tile(w, gamma, cols, D, BLOCK_D, DTYPE), input_precision=PRECISION)
                if gamma is not None:
                    xhat = (tile.to(tl.float32) - token_mean[:, None]) * token_rstd[:, None]
                    g = token_rstd[:, None] * (g - c1[:, None] - xhat * c2[:, None])
                    operand = xhat.to(DTYPE)
                else:
                    operand = tile.to(DTYPE)
                if ADD_INPUT:
                    g += dout.to(tl.float32)
                tl.store(dx + (dx_at[:, None] + cols[None, :]), g.to(dx.dtype.element_ty), mask=mask)

                product = tl.dot(tl.trans(da), operand, input_precision=PRECISION)
                dw_down, dgamma, dbeta = down_gradients(
                    product, db_down, w_down, owner_down, w_down_init, gamma, beta, cols, units, e, expert_scale,
                    merged_scale, D, R, BLOCK_D, BLOCK_R,
                )  # fmt: skip
                at = out + (units[:, None] * D + cols[None, :])
                add_to(at, dw_down, here[:, None] & real[None, :])
                if gamma is not None:
                    add_to(out + AT_GAMMA + cols, dgamma, real)
                    add_to(out + AT_BETA + cols, dbeta, real)

                product = tl.dot(tl.trans(dout.to(DTYPE)), h, input_precision=PRECISION)
                dw_up, db_up, run_dscale = up_gradients(
                    product, tl.sum(dout.to(tl.float32), 0), w_up, owner_up, b_up, cols, units, e, scale,
                    expert_scale, merged_scale, D, R, N, NEED_SCALE, DTYPE, BLOCK_D, BLOCK_R, BLOCK_N,
                )  # fmt: skip
                at = out + (AT_UP + cols[:, None] * R + units[None, :])
                add_to(at, dw_up, real[:, None] & here[None, :])
                if b_up is not None:
                    at = out + (AT_BIAS + bias_rows[:, None] * D + cols[None, :])
                    add_to(at, db_up, (bias_rows < max(N, 1))[:, None] & real[None, :])
                dscale += run_dscale
    if NEED_SCALE:
        tl.store(out + AT_SCALE, dscale)


SCALAR_TYPES = ("i32", "i64", "i32", "i32", "i32", "i32", "i64", "fp32", "fp32", "fp32", "fp32")


def together_launch(
    args: AdapterArguments,
    plan: Plan,
    parts: Parts,
    x: Rows,
    grad: Rows,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    buffer: Tensor,
) -> Launch:
    """The launch that fills dx, contiguous, and the buffer of parts, float32 [number, length]."""
    config = plan.configs.together
    norm = args.norm_weight is not None
    tensors = (
        x.data, grad.data, dx, mean if norm else None, rstd if norm else None, args.w_down, args.b_down, args.w_up,
        args.b_up, args.assignment, args.assignment_down, args.w_down_init, args.expert if plan.experts else None,
        args.norm_weight, args.norm_bias, args.scale_tensor, args.seed if args.dropout_p > 0 else None, buffer,
    )  # fmt: skip
    scalars = (
        args.expert_id, args.seed_id, plan.tokens, plan.expert_group, parts.tokens, plan.seed_group, plan.threshold,
        plan.keep_scale, args.scale, args.expert_scale, args.merged_scale,
    )  # fmt: skip
    constants = (
        args.width, args.bottleneck, plan.bias_rows, x.stride, grad.stride, args.activation, args.add_input,
        args.dropout_p > 0, plan.centre, parts.scale, *parts.layout, plan.dtype, plan.precision,
        config.block_t, config.block_d, plan.units, 1 << (max(plan.bias_rows, 1) - 1).bit_length(), _CLEARED,
    )  # fmt: skip
    return Launch(
        adapter_backward_together_kernel, (parts.number, 1, 1), tensors, scalars, SCALAR_TYPES, constants,
        config.num_warps, config.num_stages, dynamic=("expert_id", "seed_id"),
    )  # fmt: skip
