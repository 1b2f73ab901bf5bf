"""Times: taken in turn, summarised by percentiles, never by chance of order."""

from __future__ import annotations

import time

import pytest
import torch

from mosa_kernels.bench.timing import CacheFlush, cache_bytes, host_cost, in_turn, summarise

CPU = torch.device("cpu")


def test_percentiles() -> None:
    timing = summarise([5.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.median == 3.5
    assert timing.p20 == 2.0
    assert timing.p80 == 5.0
    assert timing.smallest == 1.0
    assert timing.runs == 6


def test_calls_run_in_turn_and_each_is_first_in_its_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = in_turn(calls, CPU, rounds=3, seconds=10, cold=True)
    assert list(times) == ["a", "b", "c"]
    assert "".join(order[3:]) == "abcbcacab"  # after one warm-up each
    assert all(timing.runs == 3 for timing in times.values())


def test_a_slow_call_is_slow_and_time_is_bounded() -> None:
    times = in_turn({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, CPU, rounds=100, seconds=0.1, cold=False)
    assert times["slow"].smallest >= 20
    assert times["fast"].median < 5
    assert 3 <= times["slow"].runs < 20


def test_a_short_call_is_repeated_within_its_time_and_a_cold_one_is_not() -> None:
    for cold, most in ((False, 25), (True, 5)):
        count = 0

        def call() -> None:
            nonlocal count
            count += 1

        in_turn({"call": call}, CPU, rounds=1, seconds=1, cold=cold)
        assert count <= most
        assert (count > 5) is not cold


def test_processor_time_does_not_count_sleep() -> None:
    times = in_turn({"sleep": lambda: time.sleep(0.02)}, CPU, rounds=3, seconds=1, cold=False, processor_time=True)
    assert times["sleep"].median < 10


def test_no_calls_no_times() -> None:
    assert in_turn({}, CPU, rounds=3, seconds=1, cold=False) == {}


def test_the_flush_is_larger_than_the_cache() -> None:
    assert CacheFlush(CPU)._buffer.numel() > cache_bytes(CPU) > 0
    assert host_cost(lambda: None, CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_times_on_a_gpu_are_those_of_the_device() -> None:
    device = torch.device("cuda", 0)
    small, large = (torch.randn(size, size, device=device) for size in (64, 4096))
    times = in_turn(
        {"small": lambda: small @ small, "large": lambda: large @ large}, device, rounds=5, seconds=5, cold=True
    )
    assert times["large"].median > 3 * times["small"].median > 0
    cost = host_cost(lambda: small @ small, device)
    assert cost is not None
    assert cost.wall >= cost.host > 0
