"""Imported where TRITON_INTERPRET=1: lets Triton's interpreter read numbers with any NumPy.

Up to Triton 3.6 it takes `int` of arrays of one element, for the bounds of a loop, which NumPy 2.5 refuses.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index
