"""The backward pass of the adapter in three launches: over tokens, over weights, and the sum of the latter's parts."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.triton.adapter_backward_tokens import tokens_launch
from mosa_kernels.backends.triton.adapter_backward_weights import weights_launch
from mosa_kernels.backends.triton.plan import architecture, parts_of, plan_of, rows_of
from mosa_kernels.backends.triton.reduce import reduce_launch


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    """The gradients asked for. One launch where only x's is, else three; the bits are the same on every run."""
    plan = plan_of(args, architecture(args.x.device))
    x, grad = rows_of(args.x), rows_of(grad_out)
    device = args.x.device
    parts = parts_of(args, plan, needs)
    weights = parts.down or parts.up
    dx = torch.empty(args.x.shape, dtype=args.x.dtype, device=device) if needs.x else None
    h = da = None
    if weights:
        shape = (2, plan.tokens, plan.padded_bottleneck)
        h, da = torch.empty(shape, dtype=args.matmul_dtype, device=device)
    if needs.x or weights:
        tokens_launch(args, plan, x, grad, mean, rstd, dx, h, da).run()
    if not weights:
        return AdapterGradients(x=dx, activity=expert_activity(args) if needs.activity else None)
    assert h is not None
    assert da is not None

    r, d = args.w_down.shape
    buffers = (
        torch.empty((parts.number, r, d), dtype=torch.float32, device=device) if parts.down else None,
        torch.empty((parts.number, d, r), dtype=torch.float32, device=device) if parts.up else None,
        torch.empty((parts.number, parts.layout[4]), dtype=torch.float32, device=device),
    )
    weights_launch(args, plan, parts, x, grad, mean, rstd, h, da, buffers).run()
    wanted = (
        (needs.w_down, args.w_down),
        (needs.w_up, args.w_up),
        (needs.norm_weight, args.norm_weight),
        (needs.norm_bias, args.norm_bias),
        (needs.b_up, args.b_up),
        (needs.b_down, args.b_down),
        (needs.scale, args.scale_tensor),
        (needs.activity, args.activity),
    )
    gradients = tuple(
        torch.empty(source.shape, dtype=source.dtype, device=device) if need and source is not None else None
        for need, source in wanted
    )
    reduce_launch(args, plan, parts, buffers, gradients).run()
    w_down, w_up, norm_weight, norm_bias, b_up, b_down, scale, activity = gradients
    return AdapterGradients(dx, w_down, b_down, w_up, b_up, norm_weight, norm_bias, scale, activity)
