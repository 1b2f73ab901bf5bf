"""Counters on the device by which the blocks of a launch find out which of them is the last; what outlives a call."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def lasting(make: Callable[[], Made], device: torch.device) -> Made:
    """What `make` returns, in memory that is kept beyond a call; on the current stream.

    `torch.compile(mode="reduce-overhead")` has a thread allocate from the pool of the graph that it is about to
    capture, and refuses a call that keeps any of it. On a thread of its own, memory comes from where it always does.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> Made:
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()


def ticket(device: torch.device) -> Tensor:
    """An int32 zero [1] for the blocks of a launch to count themselves; the last one leaves a zero.

    One stream's launches do not overlap. A graph may be replayed on any stream, so what it captures gets its own.
    """
    if device.type != "cuda" or capturing(device):
        return _zero(device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = lasting(lambda: _zero(device), device)
    return _tickets[key]


def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
