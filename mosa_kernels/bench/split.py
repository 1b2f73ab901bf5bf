"""Drawing the owner of every entry of a projection, which every backend does alike, bit by bit."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mosa_kernels.backends.split import SplitLayout
from mosa_kernels.bench.case import BACKENDS, Prepared, Provider, Work, by_backends
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.split import OPERATOR


class SplitCase:
    """The up-projection of one point, split entry by entry."""

    operator = "split"

    def __init__(self, point: Point, device: torch.device) -> None:
        d, r = point.width, point.bottleneck
        self.dtype, self.device = torch.uint8, device
        self.key: dict[str, str | int] = {"d": d, "r": r, "N": point.experts}
        self.layout = SplitLayout(d, r, point.experts, d * r, unit_per_row=r, unit_per_column=1)
        self.seed = torch.tensor(2312_02923, device=device)  # to bring it there would be timed, as a wait for the GPU
        self.floor = Work(d * r)
        self.working_set = d * r

    def providers(self) -> list[Provider]:
        return by_backends(self._prepare, [name for name in BACKENDS if name in OPERATOR.backends])

    def _prepare(self, backend: str) -> Prepared:
        call = (self.layout, self.seed, self.device)
        run = partial(OPERATOR.run, OPERATOR.choose(self.device.type, backend, *call), *call)
        return Prepared(run, lambda: _named(run()))

    def expected(self, function: str) -> Expected:
        owners = _named(OPERATOR.run("reference", self.layout, self.seed, self.device))
        return Expected({name: each.double() for name, each in owners.items()}, owners, {})


def _named(owners: Tensor) -> dict[str, Tensor]:
    return {"owners": owners.float()}
