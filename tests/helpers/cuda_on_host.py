"""Compiles an operator of csrc for the host, CUDA kernels included, so that they run on CPU tensors without a GPU.

The .cu files are compiled as they are; tests/csrc/cuda_on_host/cuda_runtime.h takes the place of CUDA's header.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "csrc" / "cuda_on_host"
CACHE = ROOT / "build" / "on_host"
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-DMOSA_WITH_CUDA", "-x", "c++")
# Line numbers, without variables: adapter_backward_bf16.cu compiles in 24 s in place of 34 s with both sanitizers.
KERNEL_FLAGS = (
    *(*COMMON, "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=undefined", "-fno-sanitize-recover=all"),
)
ADDRESSES = ("-fsanitize=address", "-fno-omit-frame-pointer")
SANITIZE = "MOSA_SANITIZE"
"""Set to 1, every kernel is built with the address sanitizer, whose runtime has to be there before Python starts."""
BINDING = """#include "{stem}_bindings.cpp"
PYBIND11_MODULE(_C, m) {{ mosa::bind_{stem}(m); }}
"""


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def sanitized_environment() -> dict[str, str] | None:
    """The environment of a Python process in which kernels run under the address sanitizer; None: there is none."""
    compiler = find_compiler()
    if compiler is None:
        return None
    answer = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(answer.stdout.strip())
    if answer.returncode != 0 or not runtime.is_absolute():
        return None
    # Python does not free all that it allocates, and every tensor has to be looked at, not only those of new sizes.
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0"
    return {**os.environ, SANITIZE: "1", "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": options}


def build(
    stem: str,
    changes: Mapping[str, tuple[str, str]] | None = None,
    sanitize: bool | None = None,
    units: Sequence[str] | None = None,
) -> ModuleType:
    """A module with what `bind_<stem>` adds to `_C`; its `*_cuda` functions run on the host, on CPU tensors' addresses.

    Args:
        stem: of the operator's files, csrc/<stem>*.cpp and csrc/<stem>*.cu.
        changes: for a test of the tests: per file of csrc, a text that stands in it once and what takes its place.
        sanitize: with the address sanitizer, which ends the process at the first access out of bounds; it works in
            processes started with `sanitized_environment`. None: where that is so.
        units: patterns of the operator's files in csrc, where the stem does not name them.

    Raises:
        RuntimeError: the compiler failed; the message is its output.
    """
    import pybind11

    csrc = ROOT / "csrc"
    patterns = [f"{stem}*.c*"] if units is None else [f"{stem}_bindings.cpp", *units]
    sources = [path for pattern in (*patterns, "parallel*.cpp", "cuda_device.cu") for path in csrc.glob(pattern)]
    headers, kernels = _texts(csrc.glob("*.h")), _texts(sources)
    binding = {f"{stem}_bindings.cpp": kernels.pop(f"{stem}_bindings.cpp"), "module.cpp": BINDING.format(stem=stem)}
    for name, (old, new) in (changes or {}).items():
        texts = kernels if name in kernels else headers
        assert texts[name].count(old) == 1, f"{name} does not contain {old!r} once"
        texts[name] = texts[name].replace(old, new)

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    glue = _cached(
        f"{stem}.o", (binding, headers, suffix), [*COMMON, "-c", *includes], headers | binding, ["module.cpp"]
    )
    sanitize = os.environ.get(SANITIZE) == "1" if sanitize is None else sanitize
    flags = [*KERNEL_FLAGS, *(ADDRESSES if sanitize else ())]
    stand_in = _texts(STAND_IN.iterdir())
    objects = [glue] + [
        _cached(f"{name}.o", (text, headers, stand_in), ["-c", f"-I{STAND_IN}", *flags], headers | {name: text}, [name])
        for name, text in kernels.items()
    ]
    inputs = [(path.name, path.parent.name) for path in objects]
    library = _cached(f"_C{suffix}", inputs, ["-shared", *flags, "-x", "none"], {}, [str(path) for path in objects])

    # pybind11 hands out a module that it has seen under the same full name, whatever file it is asked to load.
    spec = importlib.util.spec_from_file_location(f"on_host_{library.parent.name}._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _texts(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(paths)}


def _cached(name: str, inputs: object, arguments: list[str], sources: Mapping[str, str], units: list[str]) -> Path:
    """Compiles the units among the sources, unless the same has been compiled before."""
    compiler = find_compiler()
    assert compiler is not None
    key = hashlib.sha256(repr((compiler, arguments, inputs)).encode()).hexdigest()[:16]
    result = CACHE / key / name
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        for file, text in sources.items():
            (Path(folder) / file).write_text(text, encoding="utf-8")
        command = [compiler, *arguments, "-I.", *units, "-o", name]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if answer.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{answer.stderr}")
        (Path(folder) / name).replace(result)
    return result
