"""What the kernels that merge share, compiled or in Triton: which adapters they take, and how these are described."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN, dtype_names
from mosa_kernels.backends.merge import MergedWeights, MergeInput

Matrix = tuple[int, int, int]  # address or 0, elements between rows, dtype code
Vector = tuple[int, int]  # address or 0, dtype code


class Description(NamedTuple):
    """One adapter as csrc/merge.h describes it: inputs, then outputs, which are contiguous and of one dtype."""

    rank: int
    width: int
    experts: int  # rows of b_up
    w_down: Matrix
    w_down_init: Matrix
    b_down: Vector
    gamma: Vector
    beta: Vector
    w_up: Matrix
    b_up: Matrix
    scale: Vector  # on the device; without an address `scale_value` holds
    scale_value: float
    up_factor: float
    down_factor: float
    out_w_down: int
    out_b_down: int
    out_w_up: int
    out_b_up: int
    out_dtype: int


def takes(adapters: Sequence[MergeInput], dtype: torch.dtype | None, device_type: str) -> tuple[bool, str]:
    """Whether kernels on such a device merge these adapters, and if not, why."""
    if dtype is not None and dtype not in DTYPE_CODES:
        return False, f"the kernels write {dtype_names()}, not {dtype}"
    for n, adapter in enumerate(adapters):
        for name, tensor in zip(adapter._fields, adapter, strict=True):
            if not isinstance(tensor, Tensor):
                continue
            if type(tensor) not in PLAIN:
                return False, f"adapters[{n}].{name} is a {type(tensor).__name__}; the kernels take plain tensors"
            if tensor.dtype not in DTYPE_CODES:
                return False, f"adapters[{n}].{name} is {tensor.dtype}; the kernels take {dtype_names()}"
            if tensor.device.type != device_type and name != "scale":
                return False, f"adapters[{n}].{name} is on {tensor.device}, not on a {device_type} device"
    return True, ""


def empty_outputs(adapter: MergeInput, fold_norm: bool, dtype: torch.dtype) -> MergedWeights:
    w_down, w_up = adapter.w_down, adapter.w_up
    has_b_down = adapter.b_down is not None or (fold_norm and adapter.norm_bias is not None)
    return MergedWeights(
        torch.empty(w_down.shape, dtype=dtype, device=w_down.device),
        torch.empty(w_down.shape[0], dtype=dtype, device=w_down.device) if has_b_down else None,
        torch.empty(w_up.shape, dtype=dtype, device=w_down.device),
        torch.empty(w_up.shape[0], dtype=dtype, device=w_down.device) if adapter.b_up is not None else None,
    )


def describe(adapter: MergeInput, fold_norm: bool, out: MergedWeights, keep_alive: list[Tensor]) -> Description:
    """The adapter in numbers. Contiguous copies that they point to are put into `keep_alive`."""

    def matrix(tensor: Tensor | None) -> Matrix:
        if tensor is None:
            return 0, 0, 0
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
            keep_alive.append(tensor)
        return tensor.data_ptr(), tensor.stride(0), DTYPE_CODES[tensor.dtype]

    def vector(tensor: Tensor | None) -> Vector:
        if tensor is None:
            return 0, 0
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
            keep_alive.append(tensor)
        return tensor.data_ptr(), DTYPE_CODES[tensor.dtype]

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    scale = adapter.scale
    on_device = isinstance(scale, Tensor) and scale.device == adapter.w_down.device
    return Description(
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
