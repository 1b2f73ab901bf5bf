"""What forward and backward prepare alike: token rows, the normalised tile, an expert's tensors, the dropout mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.dropout import keep_rows, stream_counters
from mosa_kernels.backends.reference import expert_bias, expert_weight


class ExpertTensors(NamedTuple):
    """The adapter as one expert sees it, in the dtype of the matrix products."""

    w_down: Tensor  # [r, d]
    w_up: Tensor  # [d, r]
    bias: Tensor | None  # float32 [d], not scaled


class Normalized(NamedTuple):
    u: Tensor  # [n, d] in the dtype of the matrix products
    mean: Tensor | None  # float32 [n, 1]
    rstd: Tensor | None  # float32 [n, 1]


class Bottleneck(NamedTuple):
    z: Tensor  # [n, r] before the activation
    a: Tensor  # [n, r] after it, dropped entries zero, kept ones not divided by 1 - p
    keep: Tensor | None  # bool [n, r]


class Operands:
    """The arguments of one call in the shapes and dtypes in which the tiles use them."""

    def __init__(self, args: AdapterArguments, order: Tensor | None):
        self.args = args
        self.order = order
        self.dtype = args.matmul_dtype
        self.x = self.rows(args.x)
        self.b_down = None if args.b_down is None else args.b_down.to(self.dtype)
        # float32 parameters make native_layer_norm return float32 statistics for half-precision tokens
        self.norm_weight = None if args.norm_weight is None else args.norm_weight.float()
        self.norm_bias = None if args.norm_bias is None else args.norm_bias.float()
        self.scale = args.scale if args.scale_tensor is None else float(args.scale_tensor)
        self.kept_scale = 1 / (1 - args.dropout_p)
        self.alpha = self.scale * self.kept_scale  # the factor of `a @ w_up.T` in the output
        self.activation = ACTIVATIONS[args.activation]
        self._counters = None
        if args.dropout_p > 0:
            seed = args.seed_id if args.seed is None else args.seed
            start, high = stream_counters(seed, self.x.shape[0], args.bottleneck, args.x.device)
            self._counters = (start, high) if order is None else (start[order], high[order])

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor shaped like x as rows [T, d] in the order of the tiles."""
        rows = tensor.reshape(-1, self.args.width)
        return rows if self.order is None else rows.index_select(0, self.order)

    def expert(self, expert: int) -> ExpertTensors:
        args = self.args
        scales = (args.expert_scale, args.merged_scale)
        return ExpertTensors(
            expert_weight(args.w_down, args.assignment_down, args.w_down_init, expert, *scales).to(self.dtype),
            expert_weight(args.w_up, args.assignment, None, expert, *scales).to(self.dtype),
            None if args.b_up is None else expert_bias(args.b_up, expert).float(),
        )

    def normalized(self, x: Tensor) -> Normalized:
        if self.norm_weight is None:
            return Normalized(x.to(self.dtype), None, None)
        shape = (self.args.width,)
        u, mean, rstd = torch.native_layer_norm(x, shape, self.norm_weight, self.norm_bias, self.args.norm_eps)
        return Normalized(u.to(self.dtype), mean, rstd)

    def bottleneck(self, u: Tensor, w_down: Tensor, start: int, stop: int) -> Bottleneck:
        """The activations of tokens `start` to `stop`, whose normalised rows are `u`."""
        z = u @ w_down.mT if self.b_down is None else torch.addmm(self.b_down, u, w_down.mT)
        a = self.activation.forward(z)
        if self._counters is None:
            return Bottleneck(z, a, None)
        first, high = self._counters
        keep = keep_rows(first[start:stop], high[start:stop], self.args.bottleneck, self.args.dropout_p)
        return Bottleneck(z, torch.where(keep, a, 0), keep)
