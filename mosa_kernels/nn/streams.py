"""Where the two passes of Eq. 6 get their random numbers from, and how a recomputation finds them again.

The draws of pass h in adapter l are a function of a stream number, h and l alone. While the passes run, the device's
default generator carries a marked seed that names the stream and the passes. Activation checkpointing saves and
restores that generator, so when a block runs again in the backward pass, the mark is there again, whatever has run
since. All threads share that generator: on each device one of them at a time marks it, and a mark is read in backward
passes alone, so that what other threads run meanwhile does not take it for its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STREAM_BITS = 30
_MARK = 0x4D6F5341  # the upper half of a marked seed; nobody else's seed begins with it
_PASSES: tuple[tuple[int, ...], ...] = ((0,), (1,), (0, 1))
_MASK = 2**64 - 1


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on every one of the numbers, and on their order."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK  # splitmix64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def default_generator(device: torch.device) -> torch.Generator | None:
    """PyTorch's default generator of a device; None for kinds of devices that have none to show."""
    if device.type == "cpu":
        return torch.default_generator
    module: Any = getattr(torch, device.type, None)
    generators = getattr(module, "default_generators", ())
    if not generators:
        return None
    return generators[module.current_device() if device.index is None else device.index]


def seeded_generator(device: torch.device, seed: int) -> torch.Generator | None:
    """A generator of its own; None on the meta device, where nothing is drawn."""
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


_marking: dict[torch.device, Any] = {}  # a lock for each device


@contextmanager
def marked_generator(stream: int, passes: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """Within the context the device's default generator says which passes of which stream run."""
    generator = default_generator(device)
    if generator is None:
        yield
        return
    with _marking.setdefault(generator.device, threading.RLock()):
        state = generator.get_state()
        generator.manual_seed(_MARK << 32 | _PASSES.index(passes) << STREAM_BITS | stream)
        try:
            yield
        finally:
            generator.set_state(state)


def read_mark(device: torch.device) -> tuple[int, tuple[int, ...]] | None:
    """(stream, passes) that the device's default generator is marked with; None without a mark, and in forward passes,
    which have their draws from `two_pass` itself."""
    if torch._C._current_graph_task_id() == -1:
        return None
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return None  # the generator may not be asked for its seed then, and is not marked
    generator = default_generator(device)
    seed = 0 if generator is None else generator.initial_seed()
    if seed >> 32 != _MARK:
        return None
    return seed & (2**STREAM_BITS - 1), _PASSES[seed >> STREAM_BITS & 3]
