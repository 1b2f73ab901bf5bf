"""Runs the cases: each provider checked against float64 first, then all that passed timed in turn."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mosa_kernels.bench.adapter import DIRECTIONS, OPERATORS, Adapter
from mosa_kernels.bench.adapter_work import MERGED_DENSE
from mosa_kernels.bench.alignment import AlignmentCase
from mosa_kernels.bench.case import (
    BACKENDS,
    COMPILE,
    COMPILE_MAX,
    COMPILE_MODES,
    DENSE_COPIES,
    EAGER,
    Case,
    Prepared,
    Provider,
    Work,
    first_line,
)
from mosa_kernels.bench.granularity import GranularityCase, granularity_cases, of_one_shape
from mosa_kernels.bench.launches import count_launches
from mosa_kernels.bench.limits import Limits
from mosa_kernels.bench.masked_adamw import MaskedAdamWCase
from mosa_kernels.bench.memory import peak_bytes, saved_bytes
from mosa_kernels.bench.merge import MergeCase
from mosa_kernels.bench.shapes import DTYPES, Point
from mosa_kernels.bench.timing import cache_bytes, host_cost, in_turn

OPERATOR_NAMES = (*OPERATORS.values(), "merge", "masked_adamw", "alignment", GranularityCase.operator)
PROVIDERS = (EAGER, COMPILE, COMPILE_MAX, DENSE_COPIES, *BACKENDS, MERGED_DENSE)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NO_TIME = "no time was left for it"
NOT_OFFERED = "this part has no such provider"
_LARGE = 0.25  # of the last cache: larger working sets find little of it again in a model


@dataclass(frozen=True)
class Effort:
    """How long to measure, and what."""

    rounds: int = 11
    seconds: float = 20.0  # at most for the rounds of one case
    compiled: tuple[str, ...] = ()  # modes of torch.compile to try
    processor_time: bool = False
    providers: tuple[str, ...] | None = None  # None: all
    compile_until: float = math.inf  # on the clock time.perf_counter: later, nothing is compiled any more


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Forgets what was compiled, and lets a compiled backward pass run twice over one graph."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def cases(operators: Sequence[str], points: Sequence[Point], device: torch.device, effort: Effort) -> Iterator[Case]:
    """The cases of some operators, the adapter first, should time run out; one point's tensors live at a time."""
    wanted = [direction for direction in DIRECTIONS if OPERATORS[direction] in operators]
    if wanted:
        for point in points:
            forget_compiled(effort)
            adapter = Adapter(point, device, effort.compiled)
            yield from (adapter.case(direction) for direction in wanted)
            del adapter
    for name, make in _OF_A_MODEL.items():
        if name in operators:
            for point in of_a_model(points, name):
                forget_compiled(effort)
                yield make(point, device, effort.compiled)
    if GranularityCase.operator in operators:
        for point in of_one_shape(points):
            yield from granularity_cases(point, device)


def forget_compiled(effort: Effort) -> None:
    """The points share a function, and torch.compile gives up on one that it has compiled eight times."""
    if effort.compiled:
        import torch._dynamo

        torch._dynamo.reset()


_OF_A_MODEL: dict[str, Callable[[Point, torch.device, tuple[str, ...]], Case]] = {
    "merge": MergeCase,
    "masked_adamw": MaskedAdamWCase,
    "alignment": AlignmentCase,
}
_DEPTH, _DEEP = 12, {"vit_l": 24, "vit_g": 40, "swin_b_1": 2, "swin_b_2": 2, "swin_b_3": 18, "swin_b_4": 2}


def of_a_model(points: Iterable[Point], operator: str) -> list[Point]:
    """The points as whole models: one adapter a block, or half the blocks' features; each once.

    The optimizer keeps float32, as training does; alignment works on the features' dtype.
    """
    found: dict[Point, None] = {}
    for point in points:
        depth = _DEEP.get(point.model, _DEPTH)
        if operator == "alignment":
            found[point._replace(layers=max(1, depth // 2), bottleneck=1, experts=1, expert_per="call")] = None
        elif operator == "merge":
            found[point._replace(layers=depth, images=1, expert_per="call")] = None
        else:
            found[point._replace(layers=depth, images=1, dtype="fp32")] = None
    return list(found)


def measure_case(case: Case, device: torch.device, limits: Limits, effort: Effort) -> dict[str, Any]:
    """One case: a row for each provider, with the reason where there is no figure."""
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    offered = case.providers()
    for name in effort.providers or ():
        if name not in {provider.family for provider in offered}:
            rows[name] = {"provider": name, "ours": False, "status": "unavailable", "reason": NOT_OFFERED}
    for provider in offered:
        if effort.providers is not None and provider.family not in effort.providers:
            continue
        rows[provider.name] = row = {"provider": provider.name, "ours": provider.ours}
        if provider.base is not None:
            row["base"] = provider.base
        if provider.name in COMPILE_MODES and provider.reason is None and time.perf_counter() > effort.compile_until:
            row |= {"status": "unavailable", "reason": NO_TIME}
            continue
        prepared = admit(case, provider, row)
        if prepared is not None:
            ready[provider.name] = prepared
    cold = is_cold(case, device)
    if ready:
        times = in_turn(
            {name: prepared.run for name, prepared in ready.items()},
            device,
            rounds=effort.rounds,
            seconds=effort.seconds,
            cold=cold,
            processor_time=effort.processor_time,
        )
        for name, prepared in ready.items():
            rows[name]["ms"] = times[name]._asdict()
            rows[name] |= _figures(case, prepared, times[name].median / 1e3, limits if cold else None)
            try:
                rows[name] |= _costs(prepared, device)
            except Exception as error:  # the time stands, whatever the profiler or the hooks say
                rows[name]["note"] = f"memory and launches were not measured: {first_line(error)}"
        _compare(rows)
    return {
        "operator": case.operator,
        "case": case.key,
        "cache": "cold" if cold else "warm",
        "floor": _floor(case, limits),
        "rows": list(rows.values()),
    }


def is_cold(case: Case, device: torch.device) -> bool:
    """Whether the cache is flushed before each call."""
    return case.working_set >= _LARGE * cache_bytes(device)


def admit(case: Case, provider: Provider, row: dict[str, Any]) -> Prepared | None:
    """The provider, if it is there and its results are right; else the row says why not."""
    if provider.reason is not None:
        row |= {"status": "unavailable", "reason": provider.reason}
        return None
    try:
        prepared = provider.prepare()
        verdict = case.expected(prepared.function).check(prepared.results())
        prepared.run()
    except Exception as error:
        reason = first_line(error)
        declined = isinstance(error, ValueError) and reason.startswith("backend:")
        row |= {"status": "unavailable" if declined else "failed", "reason": reason}
        gc.collect()
        return None
    row["error"] = {"worst": verdict.name, "relative": verdict.error, "eager": verdict.eager_error}
    if verdict.reason is not None:
        row |= {"status": "red", "reason": f"error gate red: {verdict.reason}"}
        return None
    row |= {"status": "ok", "reason": None}
    return prepared


def _figures(case: Case, prepared: Prepared, seconds: float, limits: Limits | None) -> dict[str, Any]:
    """Bytes counted, and shares of the device's limits: with a warm cache the bandwidth of memory is no limit."""
    work = prepared.work
    found: dict[str, Any] = {} if work is None else {"bytes": work.bytes}
    if limits is None:
        return found
    dtype = _DTYPE_NAMES[case.dtype]
    found["share_of_limit"] = limits.seconds(case.floor, dtype) / seconds
    if work is not None:
        found["copy_share"] = work.bytes / seconds / (limits.copy * 1e9)
        rate = limits.products(dtype)
        if work.flops and rate:
            found["matrix_share"] = work.flops / seconds / (rate * 1e12)
    return found


def _floor(case: Case, limits: Limits) -> dict[str, Any]:
    seconds = limits.seconds(case.floor, _DTYPE_NAMES[case.dtype])
    bound = "copying" if limits.seconds(Work(case.floor.bytes), "") == seconds else "products"
    return {**case.floor._asdict(), "ms": seconds * 1e3, "bound": bound}


def _costs(prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """What a call costs beside its time."""
    host = host_cost(prepared.run, device)
    return {
        "saved_bytes": None if prepared.graph is None else saved_bytes(prepared.graph, prepared.own),
        "peak_bytes": peak_bytes(prepared.run, device),
        "host_us": None if host is None else host._asdict(),
        "launches": count_launches(prepared.run, device),
    }


def _compare(rows: dict[str, dict[str, Any]]) -> None:
    """Adds how many times as fast as eager PyTorch, and as its base, each provider is."""
    times = {name: row["ms"]["median"] for name, row in rows.items() if "ms" in row}
    for name, time_taken in times.items():
        base = rows[name].get("base")
        if EAGER in times:
            rows[name]["speed_up"] = times[EAGER] / time_taken
        if base in times:
            rows[name]["gain"] = times[base] / time_taken
