"""The layout that N dense experts have: N weights and biases, each multiplied by an integer mask of its own.

This is how MoSA is run without a fused kernel that knows owners: every expert has a whole up-projection and a mask of
its shape, and a forward pass picks one of them.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.nn.adapter import FusedMoSAAdapter


class DenseCopiesAdapter(nn.Module):
    """``[x] + [residual] + scale * adapter(x)`` with one dense up-projection and one mask for each expert.

    Args:
        like: the layer whose values and split are taken; it has a dense down-projection.
    """

    def __init__(self, like: FusedMoSAAdapter) -> None:
        super().__init__()
        if like.down.assignment is not None:
            raise ValueError("like: expected a dense down-projection, got a sparse one")
        self.norm, self.activation, self.scale = like.norm, like.activation, like.scale
        self.down = nn.Linear(like.dim, like.bottleneck, device="meta")
        self.down.weight, self.down.bias = like.down.weight, like.down.bias
        self.num_experts = like.num_experts
        bias = like.up.bias
        owner = like.up.assignment
        self.up = nn.ModuleList()
        for expert in range(like.num_experts):
            linear = nn.Linear(like.bottleneck, like.dim, device="meta")
            linear.weight = nn.Parameter(like.up.weight.detach().clone())
            linear.bias = nn.Parameter((bias[expert] if bias.dim() == 2 else bias).detach().clone())
            mask = torch.ones_like(like.up.weight) if owner is None else owner == expert
            linear.register_buffer("mask", mask.long())
            self.up.append(linear)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, expert: int | None = None, add_input: bool = True
    ) -> Tensor:
        """Tokens [..., d] to [..., d]; without an expert one is drawn in training, and 0 runs in evaluation."""
        if expert is None:
            expert = random.randrange(self.num_experts) if self.training else 0
        up = self.up[expert]
        u = x if self.norm is None else self.norm(x)
        a = ACTIVATIONS[self.activation].forward(self.down(u))
        out = self.scale * F.linear(a, up.weight * up.mask, up.bias)  # type: ignore[arg-type, operator]
        if add_input:
            out = x + out
        return out if residual is None else out + residual
