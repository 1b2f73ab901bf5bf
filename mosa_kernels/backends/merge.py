"""Merging adapters into plain dense ones (arXiv 2312.02923, Eq. 7 and 8): what it takes and gives, and its definition.

What is constant after training is folded: LayerNorm's weight and bias into the down-projection, the adapter's scale
and the merge rule into the up-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MergeInput(NamedTuple):
    """One trained adapter. Weights are as `torch.nn.Linear` keeps them; every tensor has its own floating dtype."""

    w_down: Tensor  # [r, d]
    b_down: Tensor | None  # [r]
    w_up: Tensor  # [d, r], one copy for all experts
    b_up: Tensor | None  # [N, d] one per expert, or [d] shared
    norm_weight: Tensor | None = None  # [d]
    norm_bias: Tensor | None = None  # [d]
    scale: float | Tensor = 1.0  # a number or []
    up_factor: float = 1.0  # of the merge rule: the expert scale over N for "mean", 1 for "jigsaw"
    w_down_init: Tensor | None = None  # [r, d], the start of a sparse down-projection; None: it is dense
    down_factor: float = 1.0  # like up_factor, on w_down - w_down_init; without w_down_init it has no effect


class MergedWeights(NamedTuple):
    """The dense adapter ``act(u @ w_down.T + b_down) @ w_up.T + b_up``, u the normalised tokens.

    Where the norm was folded, u is normalised without weight and bias.
    """

    w_down: Tensor  # [r, d]
    b_down: Tensor | None  # [r]; None where neither a bias nor a folded norm bias goes into it
    w_up: Tensor  # [d, r]
    b_up: Tensor | None  # [d]


def available() -> tuple[bool, str]:
    return True, ""


def supports_merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> tuple[bool, str]:
    return True, ""


def merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """The definition in plain PyTorch. Sums and products are in fp32, or in fp64 for adapters in fp64."""
    return [_merge_one(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]


def _merge_one(adapter: MergeInput, fold_norm: bool, dtype: torch.dtype) -> MergedWeights:
    working = torch.promote_types(adapter.w_down.dtype, torch.float32)

    def read(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(working)

    w_down, w_up, b_down, b_up = (
        adapter.w_down.detach().to(working),
        read(adapter.w_up),
        read(adapter.b_down),
        read(adapter.b_up),
    )
    assert w_up is not None
    initial = read(adapter.w_down_init)
    if initial is not None and adapter.down_factor != 1:
        w_down = initial + adapter.down_factor * (w_down - initial)
    scale = adapter.scale.detach().to(w_down) if isinstance(adapter.scale, Tensor) else adapter.scale
    gamma, beta = (read(adapter.norm_weight), read(adapter.norm_bias)) if fold_norm else (None, None)
    if beta is not None:
        b_down = w_down @ beta if b_down is None else b_down + w_down @ beta
    merged = MergedWeights(
        w_down if gamma is None else w_down * gamma,
        b_down,
        scale * adapter.up_factor * w_up,
        None if b_up is None else scale * (b_up.mean(0) if b_up.dim() == 2 else b_up),
    )
    return MergedWeights(*(None if tensor is None else tensor.to(dtype, copy=True) for tensor in merged))  # type: ignore[arg-type]
