"""What CUDA forbids while a graph is captured, done all the same: loading machine code and pinning memory.

Neither is recorded or waits for a stream, but CUDA counts both among the calls that may, unless a thread asks for the
relaxed mode of the check. Drivers of CUDA 12.3 and later load machine code then.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@contextmanager
def unrestricted() -> Iterator[None]:
    """The relaxed mode for this thread; without effect where CUDA's driver is not there."""
    exchange = _exchange()
    mode = ctypes.c_int(_RELAXED)
    exchanged = exchange is not None and exchange(ctypes.byref(mode)) == 0  # `mode` is now the one before
    try:
        yield
    finally:
        if exchange is not None and exchanged:
            exchange(ctypes.byref(mode))


@cache
def _exchange() -> Callable[[Any], int] | None:
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        found: Callable[[Any], int] = driver.cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None
    return found
