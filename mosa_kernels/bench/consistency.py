"""The consistency loss: the predictions of two passes held to the target and to each other, forward and backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mosa_kernels.bench.case import Prepared, Provider, Work, by_backends, generator
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.consistency import consistency


class ConsistencyCase:
    """Logits [images, classes] of two passes, and classes as the target."""

    operator = "consistency"

    def __init__(self, point: Point, classes: int, device: torch.device) -> None:
        draws = generator()
        self.dtype = point.torch_dtype
        self.key: dict[str, str | int] = {"batch": point.images, "classes": classes, "dtype": point.dtype}
        self.logits = [
            torch.randn(point.images, classes, generator=draws).to(device, self.dtype).requires_grad_()
            for _ in range(2)
        ]
        self.target = torch.randint(classes, (point.images,), generator=draws).to(device)
        size = point.images * classes * self.dtype.itemsize
        self.floor = Work(6 * size)  # both are read forward, and again backward, which writes two gradients
        self.working_set = 4 * size

    def providers(self) -> list[Provider]:
        return by_backends(self._prepare)

    def _prepare(self, backend: str) -> Prepared:
        run = partial(_both, self.logits, self.target, backend)
        return Prepared(run, lambda: _named(*run()))

    def expected(self, function: str) -> Expected:
        double = [logits.detach().double().requires_grad_() for logits in self.logits]
        exact, eager = (_named(*_both(logits, self.target, "reference")) for logits in (double, self.logits))
        return Expected(exact, eager, {})


def _both(logits: list[Tensor], target: Tensor, backend: str) -> tuple[Tensor, ...]:
    cross_entropy, divergence = consistency(logits[0], logits[1], target, backend=backend)
    return cross_entropy, divergence, *torch.autograd.grad(cross_entropy + divergence, logits)


def _named(*results: Tensor) -> dict[str, Tensor]:
    names = ("cross_entropy", "divergence", "logits1", "logits2")
    return {name: tensor.detach() for name, tensor in zip(names, results, strict=True)}
