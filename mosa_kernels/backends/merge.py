"""Merging adapters into plain dense ones (arXiv 2312.02923, Eq. 7 and 8): the definition, and the compiled kernels.

What is constant after training is folded: LayerNorm's weight and bias into the down-projection, the adapter's scale
and the merge rule into the up-projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels._extension import extension, has_code_for

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The element types of the compiled kernels, as csrc/dtype.h numbers them."""


class MergeInput(NamedTuple):
    """One trained adapter. Weights are as `torch.nn.Linear` keeps them; every tensor has its own floating dtype."""

    w_down: Tensor  # [r, d]
    b_down: Tensor | None  # [r]
    w_up: Tensor  # [d, r], one copy for all experts
    b_up: Tensor | None  # [N, d] one per expert, or [d] shared
    norm_weight: Tensor | None = None  # [d]
    norm_bias: Tensor | None = None  # [d]
    scale: float | Tensor = 1.0  # a number or []
    up_factor: float = 1.0  # of the merge rule: 1/N for "mean", 1 for "jigsaw", each times the expert scale
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


def merge_reference(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """The definition in plain PyTorch. Sums and products are in fp32, or in fp64 for adapters in fp64."""
    return [_merge_one(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]


def _merge_one(adapter: MergeInput, fold_norm: bool, dtype: torch.dtype) -> MergedWeights:
    working = torch.float64 if adapter.w_down.dtype == torch.float64 else torch.float32

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


def supports_compiled(adapters: Sequence[MergeInput], dtype: torch.dtype | None, device_type: str) -> tuple[bool, str]:
    """Whether the compiled kernels for "cpu" or "cuda" merge these adapters, and if not, why."""
    built = extension()
    reason = built.reason if device_type == "cpu" else built.cuda_reason
    if reason is not None:
        return False, reason
    if device_type == "cuda":
        for device in {a.w_down.device for a in adapters if a.w_down.is_cuda}:
            capability = torch.cuda.get_device_capability(device)
            if not has_code_for(capability):
                return False, "the CUDA kernels were not built for sm_{}{}".format(*capability)
    if dtype is not None and dtype not in DTYPE_CODES:
        return False, f"the kernels write {_dtype_names()}, not {dtype}"
    for n, adapter in enumerate(adapters):
        for name, tensor in _tensors(adapter):
            if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
                return False, f"adapters[{n}].{name} is a {type(tensor).__name__}; the kernels take plain tensors"
            if tensor.dtype not in DTYPE_CODES:
                return False, f"adapters[{n}].{name} is {tensor.dtype}; the kernels take {_dtype_names()}"
            if tensor.device.type != device_type and name != "scale":
                return False, f"adapters[{n}].{name} is on {tensor.device}, not on a {device_type} device"
    return True, ""


def merge_compiled(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """The compiled kernels, for adapters that `supports_compiled` takes and that live on one device.

    On a GPU nothing waits: the kernels are enqueued on the current stream, one launch per 26 adapters (the 4 KiB that
    the parameters of a kernel may take).
    """
    module = extension().module
    assert module is not None
    device = adapters[0].w_down.device
    outputs = [_empty_outputs(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]
    keep_alive: list[Tensor] = []
    table = [_descriptor(module, a, fold_norm, out, keep_alive) for a, out in zip(adapters, outputs, strict=True)]
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        module.merge_cuda(table, stream.device_index, stream.cuda_stream)
    else:
        module.merge_cpu(table, torch.get_num_threads())
    return outputs


def _tensors(adapter: MergeInput) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in adapter._asdict().items() if isinstance(value, Tensor)]


def _dtype_names() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)


def _empty_outputs(adapter: MergeInput, fold_norm: bool, dtype: torch.dtype) -> MergedWeights:
    w_down, w_up = adapter.w_down, adapter.w_up
    has_b_down = adapter.b_down is not None or (fold_norm and adapter.norm_bias is not None)
    return MergedWeights(
        w_down.new_empty(w_down.shape, dtype=dtype, requires_grad=False),
        w_down.new_empty(w_down.shape[0], dtype=dtype) if has_b_down else None,
        w_up.new_empty(w_up.shape, dtype=dtype),
        w_up.new_empty(w_up.shape[0], dtype=dtype) if adapter.b_up is not None else None,
    )


def _descriptor(
    module: ModuleType, adapter: MergeInput, fold_norm: bool, out: MergedWeights, keep_alive: list[Tensor]
) -> object:
    """The adapter as csrc/merge.h describes it. Contiguous copies that it points to are put into `keep_alive`."""

    def matrix(tensor: Tensor | None) -> tuple[int, int, int]:
        if tensor is None:
            return 0, 0, 0
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        keep_alive.append(rows)
        return rows.data_ptr(), rows.stride(0), DTYPE_CODES[rows.dtype]

    def vector(tensor: Tensor | None) -> tuple[int, int]:
        if tensor is None:
            return 0, 0
        values = tensor.detach().contiguous()
        keep_alive.append(values)
        return values.data_ptr(), DTYPE_CODES[values.dtype]

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    scale = adapter.scale
    on_device = isinstance(scale, Tensor) and scale.device == adapter.w_down.device
    return module.MergeAdapter(
        rank=adapter.w_down.shape[0],
        width=adapter.w_down.shape[1],
        experts=0 if adapter.b_up is None else adapter.b_up.numel() // adapter.b_up.shape[-1],
        w_down=matrix(adapter.w_down),
        w_down_init=matrix(adapter.w_down_init),
        b_down=vector(adapter.b_down),
        gamma=vector(adapter.norm_weight if fold_norm else None),
        beta=vector(adapter.norm_bias if fold_norm else None),
        w_up=matrix(adapter.w_up),
        b_up=matrix(adapter.b_up),
        scale=vector(scale) if isinstance(scale, Tensor) and on_device else (0, 0),
        scale_value=1.0 if on_device else float(scale),
        up_factor=adapter.up_factor,
        down_factor=adapter.down_factor,
        out_w_down=address(out.w_down),
        out_b_down=address(out.b_down),
        out_w_up=address(out.w_up),
        out_b_up=address(out.b_up),
        out_dtype=DTYPE_CODES[out.w_down.dtype],
    )
