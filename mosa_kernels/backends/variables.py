"""Environment variables that switch kernels: a value that means nothing is an error, not a switch that stays off."""

from __future__ import annotations

import os


def whole_number(variable: str, expected: str, most: int | None = None) -> int:
    """What a variable holds, from 0 to `most`; 0 where it is empty or not there.

    Raises:
        ValueError: it holds something else than is `expected`, in words.
    """
    value = os.environ.get(variable) or "0"
    if not value.isdecimal() or (most is not None and int(value) > most):
        raise ValueError(f"{variable}: expected {expected}, got {value!r}")
    return int(value)
