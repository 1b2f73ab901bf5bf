"""Layers whose parameters have all left their initial values, and what they compute by definition."""

from __future__ import annotations

import torch
from oracle import double, oracle_adapter
from torch import Tensor

import mosa_kernels as mk
from mosa_kernels.backends.arguments import AdapterArguments

D, R = 20, 6


def trained_layer(**options: object) -> mk.FusedMoSAAdapter:
    """A layer whose parameters have all left their initial values, in the entries that its experts own."""
    layer = mk.FusedMoSAAdapter(D, R, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def layer_oracle(layer: mk.FusedMoSAAdapter, x: Tensor, expert: int, merged_scale: float) -> Tensor:
    return oracle_adapter(
        double(
            AdapterArguments(
                x,
                None,
                layer.down.weight,
                layer.down.bias,
                layer.up.weight,
                layer.up.bias,
                layer.up.assignment,
                layer.down.assignment,
                layer.down.initial,
                None,
                None if layer.norm is None else layer.norm.weight,
                None if layer.norm is None else layer.norm.bias,
                layer.scale if isinstance(layer.scale, Tensor) else None,
                None,
                None,
                expert_id=expert,
                activation=layer.activation,
                scale=1.0 if isinstance(layer.scale, Tensor) else layer.scale,
                expert_scale=layer.expert_scale,
                merged_scale=merged_scale,
            )
        )
    )


OPTIONS = [
    {},
    {"num_experts": 1},
    {"num_experts": 3, "sparse": "down"},
    {"sparse": "both", "expert_bias": False, "norm": False},
    {"granularity": "row", "activation": "relu", "expert_scale": "N"},
    {"granularity": "block", "bottleneck": R, "num_experts": 2, "learnable_scale": True},
    {"merge_rule": "jigsaw", "activation": "silu", "scale": 1.0},
    {"pruned": True},
    {"pruned": True, "num_experts": 2, "expert_scale": "N"},
]
