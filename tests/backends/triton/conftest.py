"""Kernels on Triton's interpreter, where the environment asks for it."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter  # noqa: F401
