"""Compiles csrc for the host, CUDA kernels included, so that they run on CPU tensors without a GPU.

The .cu files are compiled as they are; tests/csrc/cuda_on_host/cuda_runtime.h takes the place of CUDA's header.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests" / "csrc" / "cuda_on_host"
CACHE = ROOT / "build" / "on_host"
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DMOSA_WITH_CUDA"),
    *("-fsanitize=undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"),
)


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++").split()[0])


def build(changes: Mapping[str, tuple[str, str]] | None = None) -> ModuleType:
    """The module `_C`, whose `*_cuda` functions run on the host and take addresses of CPU tensors.

    Args:
        changes: for a test of the tests: per file of csrc, a text that stands in it once and what takes its place.

    Raises:
        RuntimeError: the compiler failed; the message is its output.
    """
    import pybind11

    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc").iterdir())}
    for name, (old, new) in (changes or {}).items():
        assert sources[name].count(old) == 1, f"{name} does not contain {old!r} once"
        sources[name] = sources[name].replace(old, new)
    stand_ins = {path.name: path.read_text(encoding="utf-8") for path in sorted(STAND_IN.iterdir())}
    compiler = find_compiler()
    assert compiler is not None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = hashlib.sha256(repr((sources, stand_ins, FLAGS, compiler, suffix)).encode()).hexdigest()[:16]
    library = CACHE / key / f"_C{suffix}"
    if not library.exists():
        folder = CACHE / f"{key}.{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
        info = 'kVersion = "host", *kCompiler = "", *kCudaToolkit = "", *kCudaArchitectures = ""'
        header = f"#pragma once\nnamespace mosa::build_info {{ inline constexpr const char *{info}; }}\n"
        (folder / "build_info.h").write_text(header, encoding="utf-8")
        includes = [folder, STAND_IN, pybind11.get_include(), sysconfig.get_path("include")]
        units = [str(folder / name) for name in sources if name.endswith((".cpp", ".cu"))]
        command = [compiler, *FLAGS, *(f"-I{path}" for path in includes), "-x", "c++", *units]
        result = subprocess.run([*command, "-o", str(folder / library.name)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
        library.parent.mkdir(parents=True, exist_ok=True)
        (folder / library.name).replace(library)
        shutil.rmtree(folder)
    # pybind11 hands out a module that it has seen under the same full name, whatever file it is asked to load.
    spec = importlib.util.spec_from_file_location(f"on_host_{key}._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
