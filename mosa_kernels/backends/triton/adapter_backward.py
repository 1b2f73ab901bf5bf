"""The backward pass of the adapter in three launches: over tokens, over weights, and the sum of the latter's parts.

The first two can be one (`configs.ONE_LAUNCH`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.triton.adapter_backward_together import together_launch
from mosa_kernels.backends.triton.adapter_backward_tokens import tokens_launch
from mosa_kernels.backends.triton.adapter_backward_weights import weights_launch
from mosa_kernels.backends.triton.adapter_units import lists_for
from mosa_kernels.backends.triton.plan import architecture, parts_of, plans_of, rows_of, together_parts
from mosa_kernels.backends.triton.reduce import reduce_launch


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    """The gradients asked for. One launch where only x's is, else three, or two; the bits are the same on every run."""
    plans = plans_of(args, architecture(args.x.device), lists_for(args))
    plan, lists = plans[0]
    x, grad = rows_of(args.x), rows_of(grad_out)
    device = args.x.device
    dx = torch.empty(args.x.shape, dtype=args.x.dtype, device=device) if needs.x else None
    together = together_parts(args, plan, needs)
    parts = together or parts_of(args, plan, needs)
    if not (parts.down or parts.up):
        if dx is not None:
            for each, its_lists in plans:
                tokens_launch(args, each, x, grad, its_lists, mean, rstd, dx, None).run()
        return AdapterGradients(x=dx, activity=expert_activity(args) if needs.activity else None)

    buffer = torch.empty((parts.number, parts.layout[-1]), dtype=torch.float32, device=device)
    if together is not None and dx is not None:
        together_launch(args, plan, together, x, grad, mean, rstd, dx, buffer).run()
    else:
        h = torch.empty((2, plan.tokens, plan.padded_bottleneck), dtype=args.matmul_dtype, device=device)
        for each, its_lists in plans:
            tokens_launch(args, each, x, grad, its_lists, mean, rstd, dx, h).run()
        weights_launch(args, plan, parts, x, grad, lists, mean, rstd, h, buffer).run()
    w_down, w_up, norm_weight, norm_bias, b_up, b_down, scale, activity = gradients = (
        _gradient_of(args.w_down, needs.w_down),
        _gradient_of(args.w_up, needs.w_up),
        _gradient_of(args.norm_weight, needs.norm_weight),
        _gradient_of(args.norm_bias, needs.norm_bias),
        _gradient_of(args.b_up, needs.b_up),
        _gradient_of(args.b_down, needs.b_down),
        _gradient_of(args.scale_tensor, needs.scale),
        _gradient_of(args.activity, needs.activity),
    )
    reduce_launch(args, parts, buffer, gradients).run()
    return AdapterGradients(dx, w_down, b_down, w_up, b_up, norm_weight, norm_bias, scale, activity)


def _gradient_of(source: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty_like(source) if needed and source is not None else None
