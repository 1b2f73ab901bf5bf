"""What it brings that an expert owns whole units, rows or blocks: the kernels leave out what it owns nothing of.

One case has the same adapter with each kind of split, so that all are timed in turn; eager PyTorch, whose masked
products are dense, takes the same time for all of them and is timed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch

from mosa_kernels.bench.adapter import Adapter
from mosa_kernels.bench.case import BACKENDS, EAGER, Prepared, Provider
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point

RANDOM = "element"
GRANULARITIES = (RANDOM, "block", "row", "column")
_TITLES = {"forward": "forward", "both": "forward + backward"}


class GranularityCase:
    """One point in one direction ("forward" or "both"), with every kind of split."""

    operator = "granularity"

    def __init__(self, adapters: dict[str, Adapter], direction: str) -> None:
        self._adapters, self.direction = adapters, direction
        self._cases = {name: adapter.case(direction) for name, adapter in adapters.items()}
        of_random = self._cases[RANDOM]
        self.key: dict[str, str | int] = {**of_random.key, "pass": _TITLES[direction]}
        self.dtype, self.floor, self.working_set = of_random.dtype, of_random.floor, of_random.working_set

    def providers(self) -> list[Provider]:
        by_name = {name: {each.name: each for each in case.providers()} for name, case in self._cases.items()}
        found = [_renamed(by_name[RANDOM][EAGER], EAGER, RANDOM)]
        for backend in BACKENDS:
            if by_name[RANDOM][backend].reason is not None:
                found.append(by_name[RANDOM][backend])
                continue
            for granularity, providers in by_name.items():
                base = None if granularity == RANDOM else f"{backend}, {RANDOM}"
                found.append(_renamed(providers[backend], f"{backend}, {granularity}", granularity, base))
        return found

    def expected(self, function: str) -> Expected:
        return self._adapters[function].expected("expert", self.direction)


def _renamed(provider: Provider, name: str, granularity: str, base: str | None = None) -> Provider:
    def prepare() -> Prepared:
        return provider.prepare()._replace(function=granularity)

    return provider._replace(name=name, prepare=prepare, base=base)


def granularity_cases(point: Point, device: torch.device) -> list[GranularityCase]:
    """Both cases of a point; they share their tensors."""
    adapters = {name: Adapter(point, device, granularity=name) for name in GRANULARITIES}
    return [GranularityCase(adapters, direction) for direction in _TITLES]


def of_one_shape(points: Iterable[Point]) -> Sequence[Point]:
    """The points that differ from the first in their bottleneck, dtype and choice of experts alone."""
    several = [point for point in points if point.experts > 1]
    alike = partial(Point._replace, bottleneck=0, dtype="", expert_per="")
    return [point for point in several if alike(point) == alike(several[0])]
