"""The alignment loss: features of half the blocks, compared between two passes, forward and backward."""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from mosa_kernels.backends.alignment import feature_alignment as by_definition
from mosa_kernels.bench.case import (
    BACKENDS,
    COMPILE,
    COMPILE_MAX,
    EAGER,
    Prepared,
    Provider,
    Work,
    compiled,
    generator,
)
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.alignment import feature_alignment


class AlignmentCase:
    """`point.layers` pairs of features [images, tokens, d]; the loss and its gradients for both."""

    operator = "alignment"

    def __init__(self, point: Point, device: torch.device, asked: tuple[str, ...] = ()) -> None:
        self.dtype, self._asked = point.torch_dtype, asked
        self._point, self._device = point, device
        left_out = ("r", "N", "expert per")
        self.key = {name: value for name, value in point.key().items() if name not in left_out}
        size = point.tokens * point.width * self.dtype.itemsize
        # Both features are read forward, and again backward, which writes two gradients.
        self.floor = Work(6 * point.layers * size)
        self.working_set = 4 * point.layers * size

    @cached_property
    def features(self) -> list[list[Tensor]]:
        """Drawn on first use: what a deadline leaves out is named, and never drawn."""
        point, draws = self._point, generator()
        shape = (point.images, point.tokens // point.images, point.width)
        return [
            [
                torch.randn(shape, generator=draws).to(self._device, self.dtype).requires_grad_()
                for _ in range(point.layers)
            ]
            for _ in range(2)
        ]

    def providers(self) -> list[Provider]:
        found = [Provider(EAGER, partial(self._prepare, by_definition))]
        found += compiled(by_definition, (COMPILE, COMPILE_MAX), self._asked, self._prepare)
        for name in BACKENDS:
            found.append(Provider(name, partial(self._prepare, partial(feature_alignment, backend=name)), ours=True))
        return found

    def _prepare(self, loss: object) -> Prepared:
        assert callable(loss)
        first, second = self.features
        leaves = [*first, *second]

        def forward() -> Tensor:
            return loss(first, second)

        def both() -> tuple[Tensor, ...]:
            out = forward()
            return (out, *torch.autograd.grad(out, leaves))

        def results() -> dict[str, Tensor]:
            return _named(*both())

        return Prepared(both, results, None, forward, leaves)

    def expected(self, function: str) -> Expected:
        double = [[tensor.detach().double().requires_grad_() for tensor in half] for half in self.features]
        exact, eager = (
            _named(out, *torch.autograd.grad(out, [*halves[0], *halves[1]]))
            for halves in (double, self.features)
            for out in [by_definition(*halves)]
        )
        return Expected(exact, eager, {})


def _named(loss: Tensor, *gradients: Tensor) -> dict[str, Tensor]:
    return {"loss": loss.detach(), "gradients": torch.stack(gradients)}
