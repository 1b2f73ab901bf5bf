"""The adapter as the paper writes it, in plain differentiable PyTorch (arXiv 2312.02923, section 3).

This is the readable definition, the fallback for whatever no fused backend takes, and the baseline of every benchmark.
It keeps every intermediate, as eager PyTorch does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import MERGED, AdapterArguments, experts_that_ran
from mosa_kernels.backends.dropout import keep_mask


def available() -> tuple[bool, str]:
    return True, ""


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    return True, ""


def expert_weight(
    weight: Tensor,
    assignment: Tensor | None,
    initial: Tensor | None,
    expert: Tensor | int,
    expert_scale: float,
    merged_scale: float,
) -> Tensor:
    """The projection that an expert sees (Eq. 3 to 5, and Eq. 7 for the merged one).

    Args:
        weight: trained values [m, n].
        assignment: owner of each entry, uint8 [m, n]; None: every expert sees `weight`.
        initial: what an expert sees outside its own entries [m, n]; None: zeros.
        expert: id, or ids [] or [G]; -1 is the merged projection.

    Returns:
        [m, n], or [G, m, n] for ids [G].
    """
    if assignment is None:
        return weight
    rest = torch.zeros_like(weight) if initial is None else initial.to(weight.dtype)
    owned_values = weight if expert_scale == 1 else rest + expert_scale * (weight - rest)
    merged = weight if merged_scale == 1 else rest + merged_scale * (weight - rest)
    if isinstance(expert, int):
        return merged if expert == MERGED else torch.where(assignment == expert, owned_values, rest)
    ids = expert.reshape(*expert.shape, 1, 1)  # [1, 1] or [G, 1, 1]
    return torch.where(ids == MERGED, merged, torch.where(assignment == ids, owned_values, rest))


def expert_bias(b_up: Tensor, expert: Tensor | int) -> Tensor:
    """The up-projection's bias for an expert: [d], or [G, 1, d] for ids [G]."""
    if b_up.dim() == 1:
        return b_up
    if isinstance(expert, int):
        return b_up.mean(0) if expert == MERGED else b_up[expert]
    ids = expert.long().reshape(-1)  # [G]
    rows = torch.where(ids.unsqueeze(-1) == MERGED, b_up.mean(0), b_up.index_select(0, ids.clamp(min=0)))  # [G, d]
    return rows.unsqueeze(-2) if expert.dim() else rows.squeeze(0)


def adapter(args: AdapterArguments) -> Tensor:
    """``[x] + [residual] + scale * (dropout(act(u @ w_down.T + b_down)) @ w_up_e.T + b_up_e)``, shaped like x."""
    x, dtype = args.x, args.compute_dtype or args.x.dtype
    expert = args.expert_id if args.expert is None else args.expert
    groups = 1 if args.expert is None or args.expert.dim() == 0 else args.expert.shape[0]
    if groups == 1 and isinstance(expert, Tensor):
        expert = expert.reshape(())

    u = x
    if args.norm_weight is not None:
        bias = None if args.norm_bias is None else args.norm_bias.to(x.dtype)
        u = F.layer_norm(x, x.shape[-1:], args.norm_weight.to(x.dtype), bias, args.norm_eps)

    w_down = expert_weight(
        args.w_down, args.assignment_down, args.w_down_init, expert, args.expert_scale, args.merged_scale
    ).to(dtype)
    w_up = expert_weight(args.w_up, args.assignment, None, expert, args.expert_scale, args.merged_scale).to(dtype)
    u = u.to(dtype)
    if groups > 1:
        u = u.reshape(groups, -1, x.shape[-1])  # [G, T / G, d]

    z = u @ w_down.mT
    if args.b_down is not None:
        z = z + args.b_down.to(dtype)
    a = ACTIVATIONS[args.activation].forward(z)
    if args.dropout_p > 0:
        seed = args.seed_id if args.seed is None else args.seed
        r = w_down.shape[-2]
        keep = keep_mask(seed, a.numel() // r, r, args.dropout_p, a.device).view(a.shape)
        a = torch.where(keep, a / (1 - args.dropout_p), 0)
    y = a @ w_up.mT
    if args.b_up is not None:
        y = y + expert_bias(args.b_up, expert).to(dtype)

    scale: Tensor | float = args.scale if args.scale_tensor is None else args.scale_tensor.to(dtype)
    out = (scale * y).reshape(x.shape).to(x.dtype)
    if args.add_input:
        out = x + out
    if args.residual is not None:
        out = out + args.residual
    if args.activity is not None and args.activity.requires_grad:
        out = _ReportActivity.apply(out, args.activity, args.expert, args.expert_id)
    return out


class _ReportActivity(torch.autograd.Function):
    """Passes `out` through; its backward gives `activity` the experts that ran as its gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, activity: Tensor, expert: Tensor | None, expert_id: int) -> Tensor:
        ctx.save_for_backward(activity, expert)  # ids that were written over since are an error
        ctx.expert_id = expert_id
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        activity, expert = ctx.saved_tensors
        return grad_out, experts_that_ran(expert, ctx.expert_id, activity), None, None
