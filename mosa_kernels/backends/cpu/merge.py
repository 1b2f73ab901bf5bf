"""The merge on the CPU, compiled from csrc/merge.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.cpu.compiled import available
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.backends.merge_kernels import describe, empty_outputs, takes

__all__ = ["available", "merge", "supports_merge"]


def supports_merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> tuple[bool, str]:
    return takes(adapters, dtype, "cpu")


def merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """Runs on as many threads as PyTorch uses; their number does not change the result."""
    module = extension().module
    assert module is not None
    outputs = [empty_outputs(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]
    keep_alive: list[Tensor] = []
    described = [describe(a, fold_norm, out, keep_alive) for a, out in zip(adapters, outputs, strict=True)]
    module.merge_cpu([module.MergeAdapter(**one._asdict()) for one in described], torch.get_num_threads())
    return outputs
