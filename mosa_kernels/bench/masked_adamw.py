"""One optimizer step on all adapters of a model, when one expert of each was active and when all were."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mosa_kernels.bench.case import BACKENDS, EAGER, Prepared, Provider, Work, generator
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

    def __init__(self, point: Point, device: torch.device) -> None:
        draws = generator()
        d, r, count = point.width, point.bottleneck, point.experts
        self.dtype = point.torch_dtype
        self.key = {name: value for name, value in point.key().items() if name not in ("shape", "expert per")}
        self.key["active"] = "one expert" if point.expert_per == "call" else "all experts"

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=draws).to(device, point.torch_dtype)

        shapes = [shape for _ in range(point.layers) for shape in ((d, r), (r, d))]
        flags = torch.ones(count) if point.expert_per == "sample" else torch.arange(count) == 0
        params, grads, first, second = ([normal(*shape) for shape in shapes] for _ in range(4))
        self.state = State(
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
        # Parameter, gradient and two moments are read, all but the gradient written, and one owner's byte is read.
        sizes = [math.prod(shape) for shape in shapes]
        moved = sum(sizes) if point.expert_per == "sample" else sum(sizes[1::2]) + sum(sizes[::2]) // count
        self.floor = Work(7 * point.torch_dtype.itemsize * moved + sum(sizes[::2]))
        self.working_set = 4 * point.torch_dtype.itemsize * sum(sizes)

    def providers(self) -> list[Provider]:
        names = {EAGER: "reference", **{name: name for name in BACKENDS}}
        found = [Provider(name, partial(self._prepare, backend), name != EAGER) for name, backend in names.items()]
        return [*found, Provider(PLAIN, self._plain)]

    def _prepare(self, backend: str) -> Prepared:
        state = self.state.copy()

        def results() -> dict[str, Tensor]:
            return stepped(self.state.copy(), backend)

        return Prepared(partial(_step, state, backend), results, self.floor if backend != "reference" else None)

    def _plain(self) -> Prepared:
        """PyTorch's own fused AdamW, which moves what was inactive too: the price of a step without owners."""
        state = self.state.copy()
        counts = [torch.full((), float(_STEPS), device=p.device) for p in state.params]
        return Prepared(
            partial(_plain_step, state, counts), lambda: _plain_results(self.state.copy()), function="plain"
        )

    def expected(self, function: str) -> Expected:
        exact, eager = self.state.copy(torch.float64), self.state.copy()
        if function == "plain":
            return Expected(_plain_results(exact), _plain_results(eager), {})
        return Expected(stepped(exact, "reference"), stepped(eager, "reference"), {})


def _step(state: State, backend: str) -> None:
    masked_adamw(*state, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, backend=backend)


def stepped(state: State, backend: str) -> dict[str, Tensor]:
    """The parameters and moments after one step."""
    _step(state, backend)
    return _named(state)


def _plain_step(state: State, counts: list[Tensor]) -> None:
    adamw(
        state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, [], counts, fused=True, amsgrad=False,
        beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=DECAY, eps=EPS, maximize=False,
    )  # fmt: skip


def _plain_results(state: State) -> dict[str, Tensor]:
    _plain_step(state, [torch.full((), float(_STEPS), device=p.device) for p in state.params])
    return _named(state)


def _named(state: State) -> dict[str, Tensor]:
    columns = {"params": state.params, "exp_avgs": state.exp_avgs, "exp_avg_sqs": state.exp_avg_sqs}
    return {name: torch.cat([tensor.reshape(-1) for tensor in tensors]) for name, tensors in columns.items()}
