"""The adapter, forward, backward and both: one point's tensors, its providers, and what they have to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends import reference
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.choice import available_backends
from mosa_kernels.bench.adapter_work import FLOOR, MERGED_DENSE, adapter_work
from mosa_kernels.bench.case import (
    BACKENDS,
    COMPILE,
    COMPILE_MAX,
    COMPILE_MODES,
    DENSE_COPIES,
    EAGER,
    LEFT_OUT,
    Prepared,
    Provider,
    Work,
    generator,
    unavailable,
)
from mosa_kernels.bench.dense_copies import DenseCopiesAdapter
from mosa_kernels.bench.gate import Expected
from mosa_kernels.bench.shapes import Point
from mosa_kernels.functional.adapter import mosa_adapter
from mosa_kernels.functional.split import split
from mosa_kernels.nn.adapter import FusedMoSAAdapter

DIRECTIONS = ("forward", "backward", "both")
OPERATORS = {"forward": "adapter_forward", "backward": "adapter_backward", "both": "adapter"}
SCALE, EPS = 0.1, 1e-6
_LEAVES = ("w_down", "b_down", "w_up", "b_up", "gamma", "beta")


class Layer(NamedTuple):
    """The tensors of one adapter. The up-projection is drawn, not zero as at the start of training."""

    w_down: Tensor  # [r, d]
    b_down: Tensor  # [r]
    w_up: Tensor  # [d, r]
    b_up: Tensor  # [N, d]
    gamma: Tensor  # [d]
    beta: Tensor  # [d]
    assignment: Tensor  # uint8 [d, r]
    expert: Tensor  # int64 [] or [images]

    def with_dtype(self, dtype: torch.dtype) -> Layer:
        """Its values as new leaves."""
        moved = {name: getattr(self, name).detach().to(dtype).requires_grad_() for name in _LEAVES}
        return self._replace(**moved)


class Drawn(NamedTuple):
    """The tensors of one point."""

    x: Tensor  # [images, tokens, d]
    residual: Tensor
    grad_out: Tensor
    layers: list[Layer]


class Run(NamedTuple):
    """One provider's forward pass and the leaves of its graph."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    named: Callable[[Sequence[Tensor | None]], dict[str, Tensor]]  # the gradients of the leaves, by name
    own: Sequence[Tensor]


class Adapter:
    """One point: its tensors, drawn once and on first use, and its providers."""

    def __init__(
        self, point: Point, device: torch.device, compiled: Sequence[str] = (), granularity: str = "element"
    ) -> None:
        self.point, self.device, self.compiled = point, device, tuple(compiled)
        self._granularity = granularity
        self._compiled_objects: dict[str, Callable[..., Tensor]] = {}
        self._expected: dict[tuple[str, str], Expected] = {}

    @cached_property
    def drawn(self) -> Drawn:
        """What a deadline leaves out is named, and never drawn."""
        point, device, draws = self.point, self.device, generator()
        d, r, dtype = point.width, point.bottleneck, point.torch_dtype

        def normal(*size: int, gain: float = 1.0, shift: float = 0.0) -> Tensor:
            return (shift + gain * torch.randn(size, generator=draws)).to(device, dtype)

        shape = (point.images, point.tokens // point.images, d)
        x, residual = (normal(*shape).requires_grad_() for _ in range(2))
        grad_out = normal(*shape)
        ids = (point.images,) if point.expert_per == "sample" else ()
        layers = [
            Layer(
                normal(r, d, gain=d**-0.5).requires_grad_(),
                normal(r, gain=0.1).requires_grad_(),
                normal(d, r, gain=r**-0.5).requires_grad_(),
                normal(point.experts, d, gain=0.1).requires_grad_(),
                normal(d, gain=0.1, shift=1.0).requires_grad_(),
                normal(d, gain=0.1).requires_grad_(),
                split((d, r), num_experts=point.experts, granularity=self._granularity, generator=draws).to(device),
                torch.randint(point.experts, ids, generator=draws).to(device),
            )
            for _ in range(point.layers)
        ]
        return Drawn(x, residual, grad_out, layers)

    def case(self, direction: str) -> AdapterCase:
        return AdapterCase(self, direction)

    def function_run(self, function: Callable[..., Tensor]) -> Run:
        """A provider that takes the dense tensors as they are: function(x, layer, residual)."""
        x, residual, grad_out, layers = self.drawn
        leaves = [x, residual, *(getattr(layer, name) for layer in layers for name in _LEAVES)]
        own = [*leaves, grad_out, *(t for layer in layers for t in (layer.assignment, layer.expert))]
        return Run(lambda: chain(function, x, residual, layers), leaves, self._named, own)

    def _named(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        names = [
            "x",
            "residual",
            *(self.layer_name(n, name) for n in range(self.point.layers) for name in _LEAVES),
        ]
        return {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}

    def layer_name(self, number: int, name: str) -> str:
        return name if self.point.layers == 1 else f"{name}[{number}]"

    def compiled_run(self, name: str) -> Run:
        """The definition under torch.compile, one compiled object for all directions."""
        if name not in self._compiled_objects:
            compiled = torch.compile(by_definition, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name])
            self._compiled_objects[name] = compiled
        return self.function_run(self._compiled_objects[name])

    @cached_property
    def copies(self) -> list[DenseCopiesAdapter]:
        return [DenseCopiesAdapter(self.module(layer)) for layer in self.drawn.layers]

    def module(self, layer: Layer) -> FusedMoSAAdapter:
        """The layer as a module with these values."""
        point, dtype = self.point, self.point.torch_dtype
        module = FusedMoSAAdapter(
            point.width, point.bottleneck, point.experts, scale=SCALE, device=self.device, dtype=dtype
        )
        values = {"down.weight": layer.w_down, "down.bias": layer.b_down, "up.weight": layer.w_up}
        values |= {"norm.weight": layer.gamma, "norm.bias": layer.beta}
        with torch.no_grad():
            for name, value in values.items():
                module.get_parameter(name).copy_(value)
            module.up.bias.copy_(layer.b_up if module.up.bias.dim() == 2 else layer.b_up[0])
            if module.up.assignment is not None:
                module.up.assignment.copy_(layer.assignment)
        return module

    def copies_run(self) -> Run:
        """N weights and N masks. Gradients of experts that did not run are None; together they are the dense one."""
        (x, residual, grad_out, layers), copies = self.drawn, self.copies
        experts = [int(layer.expert) for layer in layers]
        leaves: list[Tensor] = [x, residual]
        for module in copies:
            assert module.norm is not None
            leaves += [module.down.weight, module.down.bias]
            leaves += [tensor for up in module.up for tensor in (up.weight, up.bias)]  # type: ignore[misc]
            leaves += [module.norm.weight, module.norm.bias]

        def call() -> Tensor:
            out = x
            for number, (module, expert) in enumerate(zip(copies, experts, strict=True)):
                out = module(out, residual if number == len(copies) - 1 else None, expert)
            return out

        def named(gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
            rest = list(gradients)
            found = {"x": rest.pop(0), "residual": rest.pop(0)}
            for number, layer in enumerate(layers):
                names = ["w_down", "b_down", *[f"up{n}" for n in range(2 * self.point.experts)], "gamma", "beta"]
                mine = dict(zip(names, (rest.pop(0) for _ in names), strict=True))
                b_up = torch.zeros_like(layer.b_up)
                for expert in range(self.point.experts):
                    if (row := mine.pop(f"up{2 * expert + 1}")) is not None:
                        b_up[expert] = row
                weights = [mine.pop(f"up{2 * expert}") for expert in range(self.point.experts)]
                w_up = torch.stack([weight for weight in weights if weight is not None]).sum(0)
                found |= {
                    self.layer_name(number, name): grad for name, grad in {**mine, "w_up": w_up, "b_up": b_up}.items()
                }
            return {name: grad for name, grad in found.items() if grad is not None}

        masks = [tensor for module in copies for tensor in module.buffers()]
        return Run(call, leaves, named, [*leaves, *masks, grad_out])

    def merged_call(self) -> Callable[[], Tensor]:
        """Plain dense adapters, as merging leaves them for inference."""
        dense = [self.module(layer).merge() for layer in self.drawn.layers]
        x, residual = self.drawn[:2]

        def call() -> Tensor:
            out = x
            for number, module in enumerate(dense):
                out = module(out, residual if number == len(dense) - 1 else None)
            return out

        return call

    def expected(self, function: str, direction: str) -> Expected:
        """Float64 and eager PyTorch, of the running experts or of the merged adapter."""
        key = (function, "forward" if direction == "forward" else "both")
        if key not in self._expected:
            merged = function == "merged"
            own = self.drawn
            eager = _definition(*own, merged, key[1], self._named)
            x, residual, grad_out = (t.detach().double() for t in own[:3])
            layers = [layer.with_dtype(torch.float64) for layer in own.layers]
            leaves = x.requires_grad_(), residual.requires_grad_()
            exact = _definition(*leaves, grad_out, layers, merged, key[1], self._named)
            carried = {"out": x.detach() + residual.detach(), "x": grad_out}
            added = {name: exact[name] - carried[name] for name in carried if name in exact}
            self._expected[key] = Expected(exact, eager, self._idle(), added)
        return self._expected[key]

    def _idle(self) -> dict[str, Tensor]:
        """The entries that no running expert owns."""
        found = {}
        for number, layer in enumerate(self.drawn.layers):
            ran = layer.expert.reshape(-1)
            rows = torch.arange(self.point.experts, device=self.device)
            idle_rows = ~torch.isin(rows, ran)  # [N]
            found[self.layer_name(number, "w_up")] = ~torch.isin(layer.assignment.long(), ran)
            found[self.layer_name(number, "b_up")] = idle_rows.unsqueeze(1).expand_as(layer.b_up)
        return found


def chain(function: Callable[..., Tensor], x: Tensor, residual: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Adapters one after the other; the last one adds the residual."""
    out = x
    for number, layer in enumerate(layers):
        out = function(out, layer, residual if number == len(layers) - 1 else None)
    return out


def by_definition(x: Tensor, layer: Layer, residual: Tensor | None, merged: bool = False) -> Tensor:
    """The adapter as the paper writes it, in plain PyTorch."""
    arguments = AdapterArguments(
        x, residual, layer.w_down, layer.b_down, layer.w_up, layer.b_up, layer.assignment, None, None,
        None if merged else layer.expert, layer.gamma, layer.beta, None, None, None,
        norm_eps=EPS, scale=SCALE, merged_scale=1 / layer.b_up.shape[0],
    )  # fmt: skip
    return reference.adapter(arguments)


def by_backend(name: str | None) -> Callable[..., Tensor]:
    """The adapter by a backend; None for the automatic choice."""

    def function(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        return mosa_adapter(
            x, layer.w_down, layer.b_down, layer.w_up, layer.b_up, layer.assignment, layer.expert,
            norm_weight=layer.gamma, norm_bias=layer.beta, norm_eps=EPS, scale=SCALE, residual=residual, backend=name,
        )  # fmt: skip

    return function


def _definition(
    x: Tensor,
    residual: Tensor,
    grad_out: Tensor,
    layers: Sequence[Layer],
    merged: bool,
    direction: str,
    named: Callable[[Sequence[Tensor | None]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    def function(x: Tensor, layer: Layer, residual: Tensor | None) -> Tensor:
        return by_definition(x, layer, residual, merged)

    if direction == "forward":
        with torch.no_grad():
            return {"out": chain(function, x, residual, layers)}
    leaves = [x, residual, *(getattr(layer, name) for layer in layers for name in _LEAVES)]
    out = chain(function, x, residual, layers)
    return {"out": out.detach(), **named(torch.autograd.grad(out, leaves, grad_out, allow_unused=True))}


class AdapterCase:
    """One point in one direction."""

    def __init__(self, adapter: Adapter, direction: str) -> None:
        self._adapter, self.direction = adapter, direction
        self.operator = OPERATORS[direction]
        self.key = adapter.point.key()
        self.dtype = adapter.point.torch_dtype
        floor = adapter_work(FLOOR, direction, adapter.point)
        assert floor is not None
        self.floor: Work = floor
        self.working_set = floor.bytes

    def expected(self, function: str) -> Expected:
        return self._adapter.expected(function, self.direction)

    def providers(self) -> list[Provider]:
        adapter, point = self._adapter, self._adapter.point
        found = [self._provider(EAGER, lambda: adapter.function_run(by_definition))]
        for name in (COMPILE, COMPILE_MAX):
            if name in adapter.compiled:
                found.append(self._provider(name, partial(adapter.compiled_run, name)))
            else:
                found.append(unavailable(name, LEFT_OUT))
        if point.expert_per == "call":
            found.append(self._provider(DENSE_COPIES, adapter.copies_run))
        else:
            found.append(unavailable(DENSE_COPIES, "this layout runs one expert for the whole call"))
        answers = available_backends()
        for name in BACKENDS:
            answer = answers.get(name, "this version has no such backend")
            if answer is True:
                found.append(self.by_backend(name, name))
            else:
                found.append(unavailable(name, str(answer), ours=True))
        if self.direction == "forward":
            found.append(Provider(MERGED_DENSE, self._merged))
        else:
            found.append(unavailable(MERGED_DENSE, "it is for inference"))
        return found

    def by_backend(self, name: str, backend: str) -> Provider:
        """The public function with this backend. "reference" has its host time on top of eager PyTorch's."""
        return self._provider(name, partial(self._adapter.function_run, by_backend(backend)), ours=name != EAGER)

    def _provider(self, name: str, make: Callable[[], Run], ours: bool = False) -> Provider:
        return Provider(name, lambda: self._prepared(name, make()), ours)

    def _prepared(self, name: str, run: Run) -> Prepared:
        work = adapter_work(name, self.direction, self._adapter.point)
        grad_out = self._adapter.drawn.grad_out

        def forward() -> Tensor:
            with torch.no_grad():
                return run.call()

        def both() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            out = run.call()
            return out, torch.autograd.grad(out, run.leaves, grad_out, allow_unused=True)

        def all_results() -> dict[str, Tensor]:
            out, gradients = both()
            return {"out": out.detach(), **run.named(gradients)}

        if self.direction == "forward":
            return Prepared(forward, lambda: {"out": forward()}, work)
        if self.direction == "both":
            return Prepared(both, all_results, work, run.call, run.own)
        kept: list[Any] = []

        def backward() -> object:
            if not kept:
                kept.append(run.call())
            return torch.autograd.grad(kept[0], run.leaves, grad_out, retain_graph=True, allow_unused=True)

        return Prepared(backward, all_results, work, run.call, run.own)

    def _merged(self) -> Prepared:
        call = self._adapter.merged_call()

        def forward() -> Tensor:
            with torch.no_grad():
                return call()

        work = adapter_work(MERGED_DENSE, "forward", self._adapter.point)
        return Prepared(forward, lambda: {"out": forward()}, work, function="merged")
