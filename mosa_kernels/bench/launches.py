"""How many kernels a call launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch


def count_launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills of one call, as the profiler sees them; None on a CPU or without a profiler."""
    if device.type != "cuda" or torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return None
    torch.cuda.synchronize(device)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize(device)
    except RuntimeError:  # CUPTI is held by another profiler, or not allowed
        return None
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None
