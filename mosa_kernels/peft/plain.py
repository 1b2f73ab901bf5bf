"""How a merged adapter sits in a block: two modules of plain PyTorch, without hooks, for export and tracing.

A merged model is pickled with these and with `mosa_kernels.nn.dense`; an exported program needs neither.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.adapter(self.module(*args, **kwargs))
