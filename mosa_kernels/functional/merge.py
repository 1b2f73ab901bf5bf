"""The public merge: argument checks and the choice of the backend."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mosa_kernels.backends import merge as reference
from mosa_kernels.backends.cpu import merge as cpu
from mosa_kernels.backends.cuda import merge as cuda
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.backends.triton import backend as triton
from mosa_kernels.functional.checks import check_floating


def _triton() -> ModuleType:
    from mosa_kernels.backends.triton import merge as kernels

    return kernels


def _kind(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> Kind:
    w_down = adapters[0].w_down
    return "merge", w_down.device, w_down.dtype, w_down.shape[1], w_down.shape[0], len(adapters)


OPERATOR = Operator(
    "merge",
    {
        "reference": Backend(reference.available, lambda: reference),
        "cpu": Backend(cpu.available, lambda: cpu),
        "triton": Backend(triton.available, _triton),
        "cuda": Backend(cuda.available, lambda: cuda),
    },
    {"cpu": ("cpu",)},
    kind=_kind,
)
"""On CUDA the kernels run where they were measured to be faster, or when asked for (see `backends.choice.ADAPTER`)."""

_NUMBERS = ("scale", "up_factor", "down_factor")


@torch.no_grad()
def merge_adapters(
    adapters: Sequence[MergeInput],
    *,
    fold_norm: bool = True,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> list[MergedWeights]:
    """Merges adapters into plain dense ones, all in one launch (arXiv 2312.02923, Eq. 7 and 8)::

        eff_down = w_down_init + down_factor * (w_down - w_down_init)     (w_down itself where it is dense)
        w_down   = eff_down * norm_weight            b_down = b_down + eff_down @ norm_bias
        w_up     = scale * up_factor * w_up          b_up   = scale * mean of b_up over the experts

    so that ``act(u @ w_down.T + b_down) @ w_up.T + b_up`` is the merged adapter, u the tokens normalised without
    weight and bias. Sums are in fp32. The results are new tensors without a gradient.

    Args:
        adapters: any number of adapters, of any shapes, dtypes and devices.
        fold_norm: False leaves the norm alone: u is then normalised with weight and bias.
        dtype: floating dtype of the results; None: that of each adapter's `w_down`.
        backend: None for the automatic choice per device, or "reference", "cpu", "triton", "cuda".

    Returns:
        One `MergedWeights` per adapter, in their order.

    Raises:
        TypeError: an adapter is no `MergeInput`, or a tensor or `dtype` is not floating point.
        ValueError: a shape or device is wrong, or the backend asked for cannot merge these adapters.
    """
    adapters = list(adapters)
    for n, adapter in enumerate(adapters):
        _check_adapter(n, adapter)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")
    OPERATOR.check_name(backend)

    by_device: dict[torch.device, list[int]] = {}
    for n, adapter in enumerate(adapters):
        by_device.setdefault(adapter.w_down.device, []).append(n)
    merged: dict[int, MergedWeights] = {}
    for device, numbers in by_device.items():
        group = [adapters[n] for n in numbers]
        name = OPERATOR.choose(device.type, backend, group, fold_norm, dtype)
        merged.update(zip(numbers, OPERATOR.run(name, group, fold_norm, dtype), strict=True))
    return [merged[n] for n in range(len(adapters))]


def _check_adapter(n: int, adapter: MergeInput) -> None:
    if not isinstance(adapter, MergeInput):
        raise TypeError(f"adapters[{n}]: expected a MergeInput, got {type(adapter).__name__}")
    w_down = adapter.w_down
    for name, value in zip(adapter._fields, adapter, strict=True):
        if name in _NUMBERS and not isinstance(value, Tensor):
            if not hasattr(value, "__float__"):
                raise TypeError(f"adapters[{n}].{name}: expected a number, got {type(value).__name__}")
        elif value is not None or name in ("w_down", "w_up"):
            check_floating(f"adapters[{n}].{name}", value)
    if w_down.dim() != 2 or min(w_down.shape) < 1:
        raise ValueError(f"adapters[{n}].w_down: expected shape [r, d], got {list(w_down.shape)}")
    r, d = w_down.shape
    matrix, row = (r, d), (d,)
    shapes = (matrix, (r,), (d, r), None, row, row, (), (), matrix, ())  # as the fields stand; None: any
    device = w_down.device
    for name, value, shape in zip(adapter._fields, adapter, shapes, strict=True):
        if not isinstance(value, Tensor):
            continue
        if shape is not None and value.shape != shape:
            raise ValueError(f"adapters[{n}].{name}: expected shape {list(shape)}, got {list(value.shape)}")
        if value.device != device and not (name == "scale" and value.device.type == "cpu"):
            raise ValueError(f"adapters[{n}].{name}: expected on {device} (as w_down), got {value.device}")
    b_up = adapter.b_up
    if b_up is not None and (b_up.dim() not in (1, 2) or b_up.shape[-1] != d or b_up.shape[0] < 1):
        raise ValueError(f"adapters[{n}].b_up: expected shape [{d}] or [N, {d}], got {list(b_up.shape)}")
