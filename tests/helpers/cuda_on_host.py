"""Compiles an operator of csrc for the host, CUDA kernels included, so that they run on CPU tensors without a GPU.

The .cu files are compiled as they are; tests/csrc/cuda_on_host/cuda_runtime.h takes the place of CUDA's header.
"""

from __future__ import annotations

import fcntl
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
from typing import NamedTuple

from poison import POISON

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "csrc" / "cuda_on_host"
CACHE = ROOT / "build" / "on_host"
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-DMOSA_WITH_CUDA", "-x", "c++")
# Compiling is most of the work: adapter_backward_bf16.cu takes 15 s with -O1, 9 s with -Og. Line numbers, without
# variables, which take half as long again.
KERNEL_FLAGS = (*COMMON, "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
# Without the last, GCC 12 calls the function that would begin an `extern thread_local` array without asking whether
# there is one; the sanitizer of undefined behaviour implies it.
HAS_NO_BEGINNING = "-fno-delete-null-pointer-checks"
WATCHED = {
    "behaviour": ("-fsanitize=undefined", "-fno-sanitize-recover=all"),
    "addresses": ("-fsanitize=address", "-fno-omit-frame-pointer", HAS_NO_BEGINNING),
    "races": ("-DCUDA_ON_HOST_RACES", f"-DCUDA_ON_HOST_POISON={POISON:#x}", HAS_NO_BEGINNING),
}
"""What is looked after while kernels run, and the compiler's flags for it: undefined behaviour, accesses out of bounds,
or the order of accesses (cuda_on_host/races.h). With the first two at once adapter_backward_bf16.cu takes 17 s to
compile, with the second alone 6."""
CALLS_AT_ACCESS = ("-fsanitize=thread",)
"""For the kernels alone, where races are watched; the sanitizer's own runtime is not linked."""
WATCH = "MOSA_WATCH"
"""The environment variable that says which of them; unset: undefined behaviour."""
BINDING = """#include "{stem}_bindings.cpp"
PYBIND11_MODULE(_C, m) {{ mosa::bind_{stem}(m); }}
"""


def find_compiler() -> str | None:
    """What CXX names, or g++ in place of clang, which does not link the sanitizers' runtimes into a module."""
    named = os.environ.get("CXX", "g++").split()[0]
    return shutil.which("g++" if "clang" in Path(named).name else named)


def watching_environment(watch: str) -> dict[str, str] | None:
    """The environment of a Python process in which kernels are watched for "addresses" or "races"; None: none is.

    An access out of bounds ends the process; a launch with a data race fails. Races are watched with GCC alone.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    if watch == "races":
        answer = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        return {**os.environ, WATCH: watch} if "Free Software Foundation" in answer.stdout else None
    answer = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(answer.stdout.strip())
    if answer.returncode != 0 or not runtime.is_absolute():
        return None
    # Python does not free all that it allocates, and every tensor has to be looked at, not only those of new sizes.
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0"
    return {**os.environ, WATCH: watch, "LD_PRELOAD": str(runtime), "ASAN_OPTIONS": options}


def build(
    stem: str,
    changes: Mapping[str, tuple[str, str]] | None = None,
    watch: str | None = None,
    units: Sequence[str] | None = None,
) -> ModuleType:
    """A module with what `bind_<stem>` adds to `_C`; its `*_cuda` functions run on the host, on CPU tensors' addresses.

    Args:
        stem: of the operator's files, csrc/<stem>*.cpp and csrc/<stem>*.cu.
        changes: for a test of the tests: per file of csrc, a text that stands in it once and what takes its place.
        watch: one of WATCHED; None: what the environment says. "addresses" ends the process at the first access out of
            bounds, and works in processes started with `watching_environment`. "races" has a launch fail in which two
            accesses are in no order; the error describes them.
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
    glue = _Product(
        f"{stem}.o", (binding, headers, suffix), [*COMMON, "-c", *includes], headers | binding, ["module.cpp"]
    )
    watch = watch or os.environ.get(WATCH) or "behaviour"
    stand_in = _texts(STAND_IN.iterdir())
    if watch == "races":
        kernels["races.cpp"] = stand_in["races.cpp"]
    # Of an inline function that several files have, the linker takes the first: the one that was changed.
    names = sorted(kernels, key=lambda name: name not in (changes or {}))
    objects = _made(
        [
            _Product(
                f"{name}.o",
                (kernels[name], headers, stand_in),
                ["-c", f"-I{STAND_IN}", *_flags(watch, name)],
                headers | {name: kernels[name]},
                [name],
            )
            for name in names
        ]
        + [glue]
    )
    inputs = [(path.name, path.parent.name) for path in objects]
    link = ["-shared", *KERNEL_FLAGS, *WATCHED[watch], "-x", "none"]
    (library,) = _made([_Product(f"_C{suffix}", inputs, link, {}, [str(path) for path in objects])])

    # pybind11 hands out a module that it has seen under the same full name, whatever file it is asked to load.
    spec = importlib.util.spec_from_file_location(f"on_host_{library.parent.name}._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_program(source: Path, watch: str, folder: Path) -> Path:
    """A program from one .cu file of ours that has a `main`, in `folder`."""
    compiler = find_compiler()
    assert compiler is not None
    includes = [f"-I{STAND_IN}", f"-I{ROOT / 'csrc'}"]
    objects = []
    for unit in [source, *([STAND_IN / "races.cpp"] if watch == "races" else [])]:
        objects.append(folder / f"{unit.name}.o")
        flags = [*includes, *_flags(watch, unit.name)]
        subprocess.run([compiler, "-c", *flags, str(unit), "-o", str(objects[-1])], check=True)
    program = folder / source.stem
    subprocess.run([compiler, *WATCHED[watch], "-pthread", *map(str, objects), "-o", str(program)], check=True)
    return program


def _flags(watch: str, unit: str) -> list[str]:
    """Of the compiler for a file: kernels call what watches them, and that does not call itself."""
    calls = CALLS_AT_ACCESS if watch == "races" and unit.endswith(".cu") else ()
    return [*KERNEL_FLAGS, *WATCHED[watch], *calls]


def _texts(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(paths)}


class _Product(NamedTuple):
    """What the compiler makes of units among the sources; `inputs` is all that it depends on beside the arguments."""

    name: str
    inputs: object
    arguments: list[str]
    sources: Mapping[str, str]
    units: list[str]

    def path(self) -> Path:
        key = hashlib.sha256(repr((find_compiler(), self.arguments, self.inputs)).encode()).hexdigest()[:16]
        return CACHE / key / self.name

    def make(self, result: Path) -> None:
        compiler = find_compiler()
        assert compiler is not None
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            for file, text in self.sources.items():
                (Path(folder) / file).write_text(text, encoding="utf-8")
            command = [compiler, *self.arguments, "-I.", *self.units, "-o", self.name]
            answer = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if answer.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{answer.stderr}")
            (Path(folder) / self.name).replace(result)


def _made(products: Iterable[_Product]) -> list[Path]:
    """Their paths, once all are there. Processes that want the same share the work."""
    paths = {product.path(): product for product in products}
    missing = [path for path in paths if not path.exists()]
    for wait in (fcntl.LOCK_NB, 0):
        for path in missing:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | wait)
                except BlockingIOError:
                    continue  # another process makes it: the next one meanwhile
                if not path.exists():
                    paths[path].make(path)
    return list(paths)
