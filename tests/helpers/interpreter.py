"""Imported where TRITON_INTERPRET=1: lets Triton's interpreter read numbers with any NumPy, and spares it some work.

Up to Triton 3.6 it takes `int` of arrays of one element, for the bounds of a loop, which NumPy 2.5 refuses.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang


def _patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def _patch_language_once(function: Any) -> Any:
    """For what a kernel calls, the language is what it was made into when the kernel began: going through all of it for
    each of thousands of calls took a third of the time (test_adapter.py: 188 s with it, 127 without)."""
    languages = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
    return _patch_language(function) if any(tl.core.is_builtin(lang.load) for lang in languages) else None


interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter._patch_lang = _patch_language_once
