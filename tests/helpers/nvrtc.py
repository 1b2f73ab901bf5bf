"""NVIDIA's runtime compiler of CUDA 12, the last one for V100 (sm_70), which the nvcc of CUDA 13 no longer serves.

`make nvrtc` puts it into build/nvrtc12, apart from the libraries of PyTorch; MOSA_NVRTC names another folder.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_size_t, c_void_p, create_string_buffer
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "tests" / "csrc" / "nvrtc"


def folder() -> Path:
    return Path(os.environ.get("MOSA_NVRTC") or ROOT / "build" / "nvrtc12") / "nvidia"


def why_not() -> str | None:
    """Why there is no compiler; None: there is."""
    if next(folder().glob("cuda_nvrtc/lib/libnvrtc.so.12*"), None) is None:
        return f"NVRTC 12 is not in {folder()} (make nvrtc downloads it)"
    return None


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(next(folder().glob("cuda_nvrtc/lib/libnvrtc.so.12*"))))


def compile_source(text: str, name: str, architecture: str, include: Path) -> bytes:
    """The machine code (for an architecture such as sm_70) of all kernels that a .cu file launches.

    Raises:
        RuntimeError: the compiler refused it; the message is its output.
    """
    library, program = _library(), c_void_p()
    includes = (HEADERS, include, folder() / "cuda_runtime" / "include", folder() / "cuda_nvcc" / "include")
    all_options = [
        *(f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space"),
        *("--include-path=" + str(path) for path in includes),
        *("--pre-include=host.h", "--display-error-number"),
    ]
    status = library.nvrtcCreateProgram(byref(program), text.encode(), name.encode(), 0, None, None)
    assert status == 0, f"nvrtcCreateProgram: {status}"
    try:
        array = (c_char_p * len(all_options))(*(option.encode() for option in all_options))
        if library.nvrtcCompileProgram(program, len(all_options), array) != 0:
            raise RuntimeError(_output(program, "ProgramLog").decode(errors="replace").rstrip("\0"))
        return _output(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _output(program: c_void_p, kind: str) -> bytes:
    size = c_size_t()
    assert getattr(_library(), f"nvrtcGet{kind}Size")(program, byref(size)) == 0
    buffer = create_string_buffer(size.value)
    assert getattr(_library(), f"nvrtcGet{kind}")(program, buffer) == 0
    return buffer.raw
