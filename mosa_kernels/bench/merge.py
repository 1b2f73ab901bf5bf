"""Merging all adapters of a model at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.bench.case import BACKENDS, EAGER, Prepared, Provider, Work, generator
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.merge import merge_adapters

SCALE = 0.1


class MergeCase:
    """The adapters of one point, `point.layers` of them; tokens play no part."""

    operator = "merge"

    def __init__(self, point: Point, device: torch.device) -> None:
        draws = generator()
        d, r, dtype = point.width, point.bottleneck, point.torch_dtype

        def normal(*size: int, shift: float = 0.0) -> Tensor:
            return (shift + 0.1 * torch.randn(size, generator=draws)).to(device, dtype)

        self.dtype = dtype
        self.key = {name: value for name, value in point.key().items() if name not in ("shape", "expert per")}
        self.adapters = [
            MergeInput(
                normal(r, d),
                normal(r),
                normal(d, r),
                normal(point.experts, d),
                normal(d, shift=1.0),
                normal(d),
                SCALE,
                1 / point.experts,
            )
            for _ in range(point.layers)
        ]
        read = sum(t.numel() * t.itemsize for a in self.adapters for t in a if isinstance(t, Tensor))
        written = point.layers * (2 * d * r + r + d) * dtype.itemsize
        self.floor = Work(read + written, point.layers * 2 * d * r)
        self.working_set = self.floor.bytes

    def providers(self) -> list[Provider]:
        names = {EAGER: "reference", **{name: name for name in BACKENDS}}
        return [Provider(name, partial(self._prepare, backend), name != EAGER) for name, backend in names.items()]

    def _prepare(self, backend: str) -> Prepared:
        run = partial(merge_adapters, self.adapters, backend=backend)
        return Prepared(run, lambda: _named(run()), self.floor if backend != "reference" else None)

    def expected(self, function: str) -> Expected:
        double = [adapter._replace(**_doubled(adapter)) for adapter in self.adapters]
        exact, eager = (_named(merge_adapters(adapters, backend="reference")) for adapters in (double, self.adapters))
        return Expected(exact, eager, {})


def _named(merged: list[MergedWeights]) -> dict[str, Tensor]:
    """Each kind of weight of all adapters, as one tensor."""
    return {
        name: torch.stack([tensor for weights in merged if (tensor := getattr(weights, name)) is not None])
        for name in MergedWeights._fields
    }


def _doubled(adapter: MergeInput) -> dict[str, Any]:
    return {name: tensor.double() for name, tensor in adapter._asdict().items() if isinstance(tensor, Tensor)}
