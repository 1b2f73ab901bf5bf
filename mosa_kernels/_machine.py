"""What this machine is called. Needs nothing but Python, so any room may ask."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """The processor and how many cores of it this process may use, in words."""
    name = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {available_cores()} core(s)"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
