"""Counters on the device by which the blocks of a launch find out which of them is the last."""

from __future__ import annotations

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def ticket(device: torch.device) -> Tensor:
    """An int32 zero [1] for the blocks of a launch to count themselves; the last one leaves a zero.

    One stream's launches do not overlap. A graph may be replayed on any stream, so what it captures gets its own.
    """
    if device.type != "cuda" or capturing(device):
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]
