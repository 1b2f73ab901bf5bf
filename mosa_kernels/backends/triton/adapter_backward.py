"""The backward pass of the adapter in two launches: over tokens, and over weights.

Or one over both, and one for the sum of its parts (`configs.ONE_LAUNCH`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.triton.adapter_backward_together import together_launch
from mosa_kernels.backends.triton.adapter_backward_tokens import tokens_launch
from mosa_kernels.backends.triton.adapter_backward_weights import weights_launch
from mosa_kernels.backends.triton.adapter_calls import Call, call_like, warms_up
from mosa_kernels.backends.triton.adapter_units import lists_for
from mosa_kernels.backends.triton.launch import Launch
from mosa_kernels.backends.triton.plan import Rows, architecture, parts_of, plans_of, rows_of, together_parts
from mosa_kernels.backends.triton.reduce import reduce_launch


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    """The gradients asked for.

    One launch where only x's is, else two; with lists of units and ids on the device one more, for merged tokens. The
    bits are the same on every run.
    """
    x, x_stride = rows_of(args.x)
    grad, grad_stride = rows_of(grad_out)
    lists = lists_for(args)
    others = (x_stride, grad_stride, needs, grad.dtype)
    call = call_like("backward", args, lists, others, _call)
    captured = call_like("backward", args, None, others, _call) if warms_up(lists) else None
    dx = torch.empty_like(args.x, memory_format=torch.contiguous_format) if needs.x else None
    parts = call.parts
    if parts is None:
        if dx is not None:
            call.run(args, (x, grad, lists, mean, rstd, dx, None, None), _launches, x_stride, grad_stride)
            if captured is not None:
                captured.prepare(args, (x, grad, None, mean, rstd, dx, None, None), _launches, x_stride, grad_stride)
        return AdapterGradients(x=dx, activity=expert_activity(args) if needs.activity else None)

    plan = call.plans[0]
    h = None
    if not call.together:
        h = torch.empty((2, plan.tokens, plan.padded_bottleneck), dtype=args.matmul_dtype, device=x.device)
    buffer = torch.empty(parts.buffer_size, dtype=torch.float32, device=x.device)
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
    further = (x, grad, lists, mean, rstd, dx, h, buffer, *gradients)
    call.run(args, further, _launches, x_stride, grad_stride)
    if captured is not None:
        further = (x, grad, None, *further[3:])
        captured.prepare(args, further, _launches, x_stride, grad_stride)
    return AdapterGradients(dx, w_down, b_down, w_up, b_up, norm_weight, norm_bias, scale, activity)


def _gradient_of(source: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty_like(source) if needed and source is not None else None


def _call(
    args: AdapterArguments, lists: Tensor | None, x_stride: int, grad_stride: int, needs: AdapterNeeds, *_: object
) -> Call:
    plans = plans_of(args, architecture(args.x.device), lists)
    together = together_parts(args, plans[0], needs)
    parts = together or parts_of(args, plans[0], needs)
    return Call(plans, parts if parts.down or parts.up else None, together is not None)


def _launches(
    call: Call, args: AdapterArguments, tensors: Sequence[Tensor], x_stride: int, grad_stride: int
) -> list[Launch]:
    x, grad, lists, mean, rstd, dx, h, buffer, *gradients = tensors
    x_rows, grad_rows = Rows(x, x_stride), Rows(grad, grad_stride)
    if call.together and call.parts is not None:
        first = [together_launch(args, call.plans[0], call.parts, x_rows, grad_rows, mean, rstd, dx, buffer)]
        return [*first, reduce_launch(args, call.parts, buffer, tuple(gradients))]
    launches = [
        tokens_launch(
            args, plan, x_rows, grad_rows, lists if plan.lists else None, mean, rstd, dx, h, call.parts, buffer
        )
        for plan in call.plans
    ]
    if call.parts is not None:
        of = call.plans[0], call.parts
        launches.append(weights_launch(args, *of, x_rows, grad_rows, lists, mean, rstd, h, buffer, tuple(gradients)))
    return launches
