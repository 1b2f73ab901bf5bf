"""FLOPs of the operators, for `torch.utils.flop_counter.FlopCounterMode`: matrix products, two FLOPs a multiply-add."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import mosa_kernels.functional.adapter  # noqa: F401  (defines the operators)
from mosa_kernels.backends.arguments import AdapterNeeds


def _product(x_shape: tuple[int, ...], w_down_shape: tuple[int, ...]) -> int:
    """One product of all tokens with one projection: 2 T d r."""
    return 2 * math.prod(x_shape) * w_down_shape[0]


@register_flop_formula(torch.ops.mosa_kernels.adapter_forward)
def adapter_forward_flops(x_shape: Any, residual_shape: Any, w_down_shape: Any, *_: Any, **__: Any) -> int:
    """Down and up: 4 T d r."""
    return 2 * _product(x_shape, w_down_shape)


@register_flop_formula(torch.ops.mosa_kernels.adapter_backward)
def adapter_backward_flops(
    grad: Any,
    mean: Any,
    rstd: Any,
    needs: list[bool],
    x_shape: Any,
    residual: Any,
    w_down_shape: Any,
    *_: Any,
    **__: Any,
) -> int:
    """The bottleneck once more and its gradient, then one product for each gradient asked for: up to 10 T d r."""
    wanted = AdapterNeeds(*needs)
    products = 2 + wanted.x + wanted.w_up + (wanted.w_down or wanted.norm_weight)
    return products * _product(x_shape, w_down_shape)
