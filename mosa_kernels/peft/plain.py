"""How a merged adapter sits in a block: modules of plain PyTorch, without hooks, for export and tracing.

A merged model is pickled with these and with `mosa_kernels.nn.dense`; an exported program needs neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def tokens_of(out: Any) -> Any:
    """What a block, attention or patch embedding hands on; of a tuple, as of MViT v2, the tokens are the first."""
    return out[0] if isinstance(out, tuple) else out


def on_tokens(function: Callable[[Tensor], Tensor], out: Any) -> Any:
    """The same output with a function of its tokens in their place."""
    return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)


class Branch(nn.Sequential):
    """All that the FFN's branch does, one after the other; what else the block hands to its FFN goes to that alone."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input
        for name, part in self.named_children():
            x = part(x, *args, **kwargs) if name == "mlp" else part(x)
        return x


class ParallelAdapter(nn.Module):
    """``branch(x) + adapter(x)``: AdaptFormer's position, where `branch` is all that the FFN's branch does to x."""

    def __init__(self, branch: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(x, residual=self.branch(x, *args, **kwargs), add_input=False)


class SequentialAdapter(nn.Module):
    """``y + adapter(y)`` of the output y of `module`."""

    def __init__(self, module: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.adapter = adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)  # Hiera's blocks ask their attention for its stride

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return on_tokens(self.adapter, self.module(*args, **kwargs))
