"""Merging all adapters of a model at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends import merge as reference
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.bench.case import (
    COMPILE,
    DENSE_COPIES,
    Prepared,
    Provider,
    Work,
    by_backends,
    compiled,
    generator,
)
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.merge import merge_adapters
from mosa_kernels.functional.split import split

SCALE = 0.1


class MergeCase:
    """The adapters of one point, `point.layers` of them; tokens play no part."""

    operator = "merge"

    def __init__(self, point: Point, device: torch.device, asked: tuple[str, ...] = ()) -> None:
        self._asked, self._experts = asked, point.experts
        self._point, self._device = point, device
        self.dtype = point.torch_dtype
        self.key = {name: value for name, value in point.key().items() if name not in ("shape", "expert per")}
        d, r = point.width, point.bottleneck
        read = 2 * d * r + r + (point.experts + 2) * d
        written = 2 * d * r + r + d
        self.floor = Work(point.layers * (read + written) * self.dtype.itemsize, point.layers * 2 * d * r)
        self.working_set = self.floor.bytes

    @cached_property
    def adapters(self) -> list[MergeInput]:
        """Drawn on first use: what a deadline leaves out is named, and never drawn."""
        point, draws = self._point, generator()
        d, r = point.width, point.bottleneck

        def normal(*size: int, shift: float = 0.0) -> Tensor:
            return (shift + 0.1 * torch.randn(size, generator=draws)).to(self._device, self.dtype)

        return [
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

    def providers(self) -> list[Provider]:
        found = by_backends(self._prepare)
        found[1:1] = compiled(reference.merge, (COMPILE,), self._asked, self._by_definition)
        return [*found, Provider(DENSE_COPIES, self._copies)]

    def _prepare(self, backend: str) -> Prepared:
        run = partial(merge_adapters, self.adapters, backend=backend)
        return Prepared(run, lambda: _named(run()), self.floor if backend != "reference" else None)

    def _by_definition(self, merge: Callable[..., list[MergedWeights]]) -> Prepared:
        run = torch.no_grad()(partial(merge, self.adapters, True, None))
        return Prepared(run, lambda: _named(run()))

    def _copies(self) -> Prepared:
        """N up-projections, each with an integer mask of its own entries: added up first, then merged as one."""
        draws, experts = generator(), range(self._experts)
        copies = []
        for adapter in self.adapters:
            d, r = adapter.w_up.shape
            owner = split((d, r), num_experts=self._experts, generator=draws).to(adapter.w_up.device)
            assert adapter.b_up is not None
            copies.append([(adapter.w_up.clone(), (owner == e).long(), adapter.b_up[e].clone()) for e in experts])

        @torch.no_grad()
        def run() -> list[MergedWeights]:
            whole = []
            for adapter, parts in zip(self.adapters, copies, strict=True):
                w_up = torch.stack([weight * mask for weight, mask, _ in parts]).sum(0)
                whole.append(adapter._replace(w_up=w_up, b_up=torch.stack([bias for *_, bias in parts])))
            return merge_adapters(whole, backend="reference")

        return Prepared(run, lambda: _named(run()))

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
