"""The activations of the bottleneck and their derivatives, as plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of the output, input) -> gradient of the input


def _identity(z: Tensor) -> Tensor:
    return z


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(_gelu_tanh, lambda g, z: torch.ops.aten.gelu_backward(g, z, approximate="tanh")),
    "relu": Activation(F.relu, lambda g, z: torch.ops.aten.threshold_backward(g, z, 0)),
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "identity": Activation(_identity, lambda g, z: g),
}
