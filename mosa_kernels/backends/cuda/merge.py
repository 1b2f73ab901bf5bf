"""The merge on a GPU, compiled from csrc/merge.cu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.cuda.backend import available
from mosa_kernels.backends.cuda.code import why_no_code
from mosa_kernels.backends.cuda.device import current
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.backends.merge_kernels import describe, empty_outputs, takes

__all__ = ["available", "merge", "supports_merge"]


def supports_merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> tuple[bool, str]:
    for device in {a.w_down.device for a in adapters if a.w_down.is_cuda}:
        reason = why_no_code(device)
        if reason is not None:
            return False, reason
    return takes(adapters, dtype, "cuda")


def merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """Enqueued on the current stream; nothing waits. One launch per 26 adapters, which travel as its parameters."""
    module = extension().module
    assert module is not None
    outputs = [empty_outputs(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]
    keep_alive: list[Tensor] = []
    described = [describe(a, fold_norm, out, keep_alive) for a, out in zip(adapters, outputs, strict=True)]
    device = adapters[0].w_down.device
    stream = torch.cuda.current_stream(device)
    table = [module.MergeAdapter(**one._asdict()) for one in described]
    with current(device):
        module.merge_cuda(table, stream.device_index, stream.cuda_stream)
    return outputs
