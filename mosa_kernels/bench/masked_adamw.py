"""One optimizer step on all adapters of a model, when one expert of each was active and when all were."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mosa_kernels.backends import masked_adamw as reference
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
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
from mosa_kernels.functional.masked_adamw import masked_adamw
from mosa_kernels.functional.split import split

PLAIN = "AdamW (dense, all entries)"
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
_STEPS = 7  # what the counts stand at: bias correction is at work


class State(NamedTuple):
    """The lists of `masked_adamw`. Each adapter has a split weight and an ordinary one, as w_up and w_down are."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    owners: list[Tensor | None]
    active: list[Tensor | None]

    def copy(self, dtype: torch.dtype | None = None) -> State:
        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.to(dtype or tensor.dtype, copy=True) for tensor in tensors]

        return State(
            moved(self.params),
            moved(self.grads),
            moved(self.exp_avgs),
            moved(self.exp_avg_sqs),
            [steps.clone() for steps in self.steps],
            self.owners,
            self.active,
        )


class MaskedAdamWCase:
    """`point.layers` adapters; `expert_per` "call" leaves one expert of each active, "sample" all of them."""

    operator = "masked_adamw"

    def __init__(self, point: Point, device: torch.device, asked: tuple[str, ...] = ()) -> None:
        self._asked, self._point, self._device = asked, point, device
        d, r = point.width, point.bottleneck
        self.dtype = point.torch_dtype
        self.key = {name: value for name, value in point.key().items() if name not in ("shape", "expert per")}
        self.key["active"] = "one expert" if point.expert_per == "call" else "all experts"
        self._shapes = [shape for _ in range(point.layers) for shape in ((d, r), (r, d))]
        # Parameter, gradient and two moments are read, all but the gradient written, and one owner's byte is read.
        sizes = [math.prod(shape) for shape in self._shapes]
        moved = sum(sizes) if point.expert_per == "sample" else sum(sizes[1::2]) + sum(sizes[::2]) // point.experts
        self.floor = Work(7 * point.torch_dtype.itemsize * moved + sum(sizes[::2]))
        self.working_set = 4 * point.torch_dtype.itemsize * sum(sizes)

    @cached_property
    def state(self) -> State:
        """Drawn on first use: what a deadline leaves out is named, and never drawn."""
        point, device, shapes, draws = self._point, self._device, self._shapes, generator()
        count = point.experts

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draws).to(device, point.torch_dtype)

        flags = torch.ones(count) if point.expert_per == "sample" else torch.arange(count) == 0
        params, grads, first, second = ([normal(*shape) for shape in shapes] for _ in range(4))
        return State(
            params,
            grads,
            first,
            [tensor.square() for tensor in second],
            [torch.full((count,) if n % 2 == 0 else (), float(_STEPS), device=device) for n in range(len(shapes))],
            [
                split(shape, num_experts=count, generator=draws).to(device) if n % 2 == 0 else None
                for n, shape in enumerate(shapes)
            ],
            [flags.float().to(device) if n % 2 == 0 else None for n in range(len(shapes))],
        )

    def providers(self) -> list[Provider]:
        found = by_backends(self._prepare)
        found[1:1] = compiled(reference.masked_adamw, (COMPILE,), self._asked, self._by_definition)
        return [*found, Provider(DENSE_COPIES, self._copies), Provider(PLAIN, self._plain)]

    def _prepare(self, backend: str) -> Prepared:
        state = self.state.copy()

        def results() -> dict[str, Tensor]:
            return stepped(self.state.copy(), backend)

        return Prepared(partial(_step, state, backend), results, self.floor if backend != "reference" else None)

    def _by_definition(self, step: Callable[[AdamWTensors, AdamWOptions], None]) -> Prepared:
        options = AdamWOptions(LR, *BETAS, EPS, DECAY)

        @torch.no_grad()
        def on(state: State) -> dict[str, Tensor]:
            step(AdamWTensors(*state), options)
            return _named(state)

        tensors = AdamWTensors(*self.state.copy())
        return Prepared(torch.no_grad()(partial(step, tensors, options)), lambda: on(self.state.copy()))

    def _copies(self) -> Prepared:
        """PyTorch's own fused AdamW over N dense copies, of which those of inactive experts have no gradient."""
        copies = Copies(self.state)
        return Prepared(copies.step, lambda: Copies(self.state).stepped())

    def _plain(self) -> Prepared:
        """PyTorch's own fused AdamW, which moves what was inactive too: the price of a step without owners."""
        state = self.state.copy()
        counts = [torch.full((), float(_STEPS), device=p.device) for p in state.params]
        return Prepared(
            partial(_plain_step, *state[:4], counts), lambda: _plain_results(self.state.copy()), function="plain"
        )

    def expected(self, function: str) -> Expected:
        exact, eager = self.state.copy(torch.float64), self.state.copy()
        if function == "plain":
            return Expected(_plain_results(exact), _plain_results(eager), {})
        return Expected(stepped(exact, "reference"), stepped(eager, "reference"), {})


class Copies:
    """Each split weight as N dense ones, with a gradient and moments of their own."""

    def __init__(self, state: State) -> None:
        copies: list[State] = []
        self._owners = state.owners
        for expert in range(max(steps.numel() for steps in state.steps)):
            copy = state.copy()
            masks = [None if owner is None else owner == expert for owner in state.owners]
            grads = [g if mask is None else g * mask for g, mask in zip(copy.grads, masks, strict=True)]
            copies.append(copy._replace(grads=grads))
        self._copies = copies
        moving = [
            (copy, n)
            for expert, copy in enumerate(copies)
            for n, (owner, active) in enumerate(zip(state.owners, state.active, strict=True))
            if (expert == 0 if owner is None else active is None or bool(active[expert]))
        ]
        self._moved = (
            [copy.params[n] for copy, n in moving],
            [copy.grads[n] for copy, n in moving],
            [copy.exp_avgs[n] for copy, n in moving],
            [copy.exp_avg_sqs[n] for copy, n in moving],
        )
        self._counts = [torch.full((), float(_STEPS), device=p.device) for p in self._moved[0]]

    def step(self) -> None:
        _plain_step(*self._moved, self._counts)

    def stepped(self) -> dict[str, Tensor]:
        """One step, and every entry from the copy of its owner."""
        self.step()
        first, *others = self._copies
        for expert, copy in enumerate(others, start=1):
            for whole, part in zip(first[0:1] + first[2:4], copy[0:1] + copy[2:4], strict=True):
                for n, owner in enumerate(self._owners):
                    if owner is not None:
                        whole[n] = torch.where(owner == expert, part[n], whole[n])
        return _named(first)


def _step(state: State, backend: str) -> None:
    masked_adamw(*state, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, backend=backend)


def stepped(state: State, backend: str) -> dict[str, Tensor]:
    """The parameters and moments after one step."""
    _step(state, backend)
    return _named(state)


def _plain_step(
    params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], counts: list[Tensor]
) -> None:
    adamw(
        params, grads, first, second, [], counts, fused=True, amsgrad=False,
        beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
    )  # fmt: skip


def _plain_results(state: State) -> dict[str, Tensor]:
    _plain_step(*state[:4], [torch.full((), float(_STEPS), device=p.device) for p in state.params])
    return _named(state)


def _named(state: State) -> dict[str, Tensor]:
    columns = {"params": state.params, "exp_avgs": state.exp_avgs, "exp_avg_sqs": state.exp_avg_sqs}
    return {name: torch.cat([tensor.reshape(-1) for tensor in tensors]) for name, tensors in columns.items()}
