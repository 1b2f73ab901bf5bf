"""Times of several calls taken in turn, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]

_WARM_UPS = 3
_FEWEST_ROUNDS = 3
_SHORT_SECONDS, _MOST_INNER = 0.005, 20  # on the CPU a repeat of a shorter call is the mean of several
_HEAD_START = 8_000_000  # cycles, some 4 ms: what the host takes for a dozen eager adapters, both ways
_DEFAULT_CACHE = 64 << 20  # bytes, where nothing says how large the last cache is


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    smallest: float
    runs: int


class HostCost(NamedTuple):
    """Microseconds of one call in a row of calls on a GPU."""

    host: float  # until the call returns
    wall: float  # until the device is done, over the row


def summarise(times: list[float]) -> Timing:
    """Median, 20th and 80th percentile and the smallest of times in milliseconds."""
    spread = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    median, p20, p80 = spread.tolist()
    return Timing(median, p20, p80, min(times), len(times))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache: a GPU's L2, a CPU's L3."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size) or _DEFAULT_CACHE
    described = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = described.read_text().strip() if described.is_file() else ""
    return int(text[:-1]) << 10 if text.endswith("K") and text[:-1].isdigit() else _DEFAULT_CACHE


class CacheFlush:
    """Pushes everything out of the last cache by writing a buffer of four times its size (on a CPU twice)."""

    def __init__(self, device: torch.device) -> None:
        size = 4 * cache_bytes(device) if device.type == "cuda" else 2 * cache_bytes(device)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


def in_turn(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    cold: bool,
    processor_time: bool = False,
) -> dict[str, Timing]:
    """The time of each call, one after the other, round by round.

    Args:
        calls: by name; each has run once already, so that nothing is compiled here.
        device: where they run. On a GPU events are recorded around each call, whose launches are then queued already,
            so the time is the device's alone; on a CPU a clock is read.
        rounds: how many times each call is timed.
        seconds: no round begins after so long, three apart.
        cold: whether the last cache is flushed before each call.
        processor_time: on a CPU, the time of this thread on the processor in place of the time on the wall.
    """
    for _ in range(_WARM_UPS if device.type == "cuda" else 1):
        for call in calls.values():
            call()
    flush = CacheFlush(device) if cold else None
    clock = time.thread_time if processor_time else time.perf_counter
    time_once = _on_gpu(device, flush) if device.type == "cuda" else _on_cpu(clock, flush)
    inner = {name: 1 if cold or device.type == "cuda" else _repeats(call, clock) for name, call in calls.items()}
    found: dict[str, list[Any]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        began = time.perf_counter()
        for number in range(rounds):
            if number >= _FEWEST_ROUNDS and time.perf_counter() - began > seconds:
                break
            first = number % len(names) if names else 0  # nobody always runs after the same neighbour
            for name in names[first:] + names[:first]:
                found[name].append(time_once(calls[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        found = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in found.items()}
    return {name: summarise(times) for name, times in found.items()}


def _on_gpu(device: torch.device, flush: CacheFlush | None) -> Callable[[Call, int], Any]:
    """Records events, to be read when all is done. The device idles first, so that it never waits for the host."""
    torch.cuda.synchronize(device)

    def time_once(call: Call, inner: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        if flush is not None:
            flush()
        start.record()
        call()
        end.record()
        return start, end

    return time_once


def _on_cpu(clock: Callable[[], float], flush: CacheFlush | None) -> Callable[[Call, int], float]:
    def time_once(call: Call, inner: int) -> float:
        if flush is not None:
            flush()
        start = clock()
        for _ in range(inner):
            call()
        return (clock() - start) / inner * 1e3

    return time_once


def _repeats(call: Call, clock: Callable[[], float]) -> int:
    start = clock()
    call()
    return max(1, min(_MOST_INNER, int(_SHORT_SECONDS / max(clock() - start, 1e-6))))


def host_cost(call: Call, device: torch.device, calls: int = 30) -> HostCost | None:
    """What a call costs the host, and what it takes from end to end; None on a CPU, where both are its time.

    So few calls that the queue of launches, about a thousand, is never full.
    """
    if device.type != "cuda":
        return None
    for _ in range(_WARM_UPS):
        call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    returned = time.perf_counter()
    torch.cuda.synchronize(device)
    done = time.perf_counter()
    return HostCost((returned - start) / calls * 1e6, (done - start) / calls * 1e6)


def warm_up(device: torch.device, seconds: float = 0.5) -> None:
    """Keeps a GPU busy until its clocks are up."""
    if device.type != "cuda":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize(device)
