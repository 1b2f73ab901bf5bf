"""What is measured: a case is one operator on one shape, with the providers that compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mosa_kernels.backends.measured import REFERENCE
from mosa_kernels.bench.gate import Expected

EAGER = "eager"
DENSE_COPIES = "N copies"
COMPILE, COMPILE_MAX = "compile", "compile max-autotune"
COMPILE_MODES = {COMPILE: "default", COMPILE_MAX: "max-autotune-no-cudagraphs"}
"""CUDA graphs are left out: they would copy x, which counts against them, and device time has no launches to save."""
LEFT_OUT = "left out by this preset; --providers asks for it"
BACKENDS = ("cpu", "triton", "cuda")
"""The fused ones, by the names that every operator takes."""


class Work(NamedTuple):
    """What a call has to move and to compute, by formula."""

    bytes: int
    flops: int = 0


class Prepared(NamedTuple):
    """A provider, ready to run."""

    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]  # for the gate
    work: Work | None = None  # None: not counted
    graph: Callable[[], object] | None = None  # its forward pass, to see what that keeps; None: there is no backward
    own: Sequence[Tensor] = ()  # what is there without this provider
    function: str = "expert"  # which of the case's functions it computes


class Provider(NamedTuple):
    """One way to compute a case."""

    name: str
    prepare: Callable[[], Prepared]
    ours: bool = False
    reason: str | None = None  # why it is not available; None: it is
    base: str | None = None  # the provider whose time this one's is set against, beside eager PyTorch's

    @property
    def family(self) -> str:
        """What --providers knows it by: its name up to a comma."""
        return self.name.partition(",")[0]


class Case(Protocol):
    """One operator on one shape."""

    operator: str
    key: dict[str, str | int]  # what names this case, here and in other reports
    floor: Work  # what no implementation can do without
    dtype: torch.dtype
    working_set: int  # bytes, to say whether it fits into the cache

    def providers(self) -> list[Provider]: ...

    def expected(self, function: str) -> Expected: ...


def by_backends(prepare: Callable[[str], Prepared], backends: Sequence[str] = BACKENDS) -> list[Provider]:
    """An operator's definition, which is eager PyTorch, and its fused backends; `prepare` is given a backend's name."""
    ours = [Provider(name, partial(prepare, name), ours=True) for name in backends]
    return [Provider(EAGER, partial(prepare, REFERENCE)), *ours]


def unavailable(name: str, reason: str, ours: bool = False) -> Provider:
    """A provider that is listed with the reason why it is not measured."""

    def prepare() -> Prepared:
        raise RuntimeError(reason)

    return Provider(name, prepare, ours, reason)


def compiled(
    function: Callable[..., Any], modes: Sequence[str], asked: Sequence[str], prepare: Callable[[Any], Prepared]
) -> list[Provider]:
    """A definition under some modes of torch.compile, as far as they are asked for."""
    found = []
    for name in modes:
        if name in asked:
            program = torch.compile(function, fullgraph=True, dynamic=False, mode=COMPILE_MODES[name])
            found.append(Provider(name, partial(prepare, program)))
        else:
            found.append(unavailable(name, LEFT_OUT))
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_line(error: Exception) -> str:
    """What an error says, for one line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
