"""Builds `mosa_kernels._C` with CMake and ninja. Needs neither PyTorch nor a GPU; metadata is in pyproject.toml.

Environment:
    MOSA_CPP: 0 leaves the whole module out: the package works without, with its pure Python backends only.
    MOSA_CUDA: 0 leaves the CUDA kernels out; 1 makes them a must; unset: they are built where nvcc is found.
    MOSA_STRICT: 1 turns compiler warnings, and a build that fails, into errors (development and CI).
    TORCH_CUDA_ARCH_LIST: GPU architectures, such as "8.0;9.0+PTX"; unset: all that nvcc and we know.
    CUDA_HOME, CXX, CUDAHOSTCXX, CMAKE_BUILD_PARALLEL_LEVEL: as usual.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
BUILD_RECORD = "_build.json"
# GPUs of compute capability 8.6 to 8.9 run the code for 8.0: the kernels have nothing else for them, and each
# architecture more takes half a minute of two cores and 10 MB.
WANTED_ARCHITECTURES = (70, 75, 80, 90, 100, 120)
# The sources tell these apart, and no others: code for other GPUs comes from the PTX of the step below, which nvcc
# makes once (25 s of 42 for the largest file). Clusters of blocks alone want 9.0; for the other kernels its PTX gave
# the same instructions as that for 8.0, after a fifth more time (164 against 135 s of one core).
STEPS = (70, 75, 80)
CLUSTER_STEPS = (*STEPS, 90)


class MissingError(Exception):
    """Something the build needs is not on this machine; the message says what, and how to get it."""


class Cuda(NamedTuple):
    nvcc: Path
    architectures: list[str]  # in CMake's spelling: 80-real, 90-virtual


def truth(environment: Mapping[str, str], name: str) -> bool | None:
    """The value of a 0/1 variable; None where it is unset or empty."""
    value = environment.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SetupError(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return None if value == "" else value == "1"


def find_program(name: str) -> Path | None:
    """A program installed beside this interpreter (the environment need not be activated), else one on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return Path(found) if found else None


def find_nvcc(environment: Mapping[str, str]) -> Path:
    """nvcc from CUDA_HOME where that is set, else from PATH, else from /usr/local/cuda.

    Raises:
        MissingError: it is not there.
    """
    if home := environment.get("CUDA_HOME") or environment.get("CUDA_PATH"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise MissingError(f"CUDA_HOME is {home}, where bin/nvcc was not found")
        return nvcc
    if on_path := shutil.which("nvcc", path=environment.get("PATH", os.defpath)):
        return Path(on_path)
    if not (nvcc := Path("/usr/local/cuda/bin/nvcc")).is_file():
        raise MissingError("nvcc was not found on PATH or in /usr/local/cuda (CUDA_HOME says where it is)")
    return nvcc


def supported_architectures(nvcc: Path) -> list[int]:
    """The compute capabilities that this nvcc compiles for, such as 75 or 120."""
    answer = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    found = [int(number) for number in re.findall(r"compute_(\d+)\b", answer.stdout)]
    if answer.returncode != 0 or not found:
        raise MissingError(f"{nvcc} does not run: {(answer.stderr or answer.stdout).strip() or 'no answer'}")
    return sorted(found)


def choose_architectures(supported: list[int], arch_list: str | None) -> list[str]:
    """CMake's architecture list: what TORCH_CUDA_ARCH_LIST names, else all wanted ones and PTX for newer GPUs."""
    if not arch_list or not arch_list.strip():
        chosen = [number for number in WANTED_ARCHITECTURES if number in supported]
        if not chosen:
            raise MissingError(f"this nvcc compiles for none of {WANTED_ARCHITECTURES}, only for {supported}")
        return [f"{number}-real" for number in chosen] + [f"{step_below(chosen[-1], CLUSTER_STEPS)}-virtual"]
    architectures = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0 or 9.0+PTX, got {entry!r}")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) not in supported:
            known = ", ".join(f"{number // 10}.{number % 10}" for number in supported)
            raise SetupError(f"TORCH_CUDA_ARCH_LIST: this nvcc compiles for {known}; got {entry!r}")
        architectures.append(f"{major}{minor}{suffix}-real")
        if ptx:
            architectures.append(f"{major}{minor}{suffix}-virtual")
    return list(dict.fromkeys(architectures))


def step_below(architecture: int, steps: tuple[int, ...]) -> int:
    """The newest of the steps up to this architecture; itself where it is older than all."""
    return max((step for step in steps if step <= architecture), default=architecture)


def code_flags(architectures: list[str], steps: tuple[int, ...]) -> list[str]:
    """nvcc's flags for an architecture list and sources that tell these steps apart."""
    flags = []
    for entry in architectures:
        name, kind = entry.split("-")
        # 90a and 120f name instructions that no step has.
        ptx = step_below(int(name), steps) if name.isdecimal() else name
        code = f"sm_{name}" if kind == "real" else f"compute_{ptx}"
        flags.append(f"--generate-code=arch=compute_{ptx},code={code}")
    return list(dict.fromkeys(flags))


def choose_cuda(environment: Mapping[str, str]) -> Cuda:
    """What to compile the CUDA kernels with.

    Raises:
        MissingError: the kernels are to be left out; the message is the reason.
        SetupError: they were asked for and cannot be compiled.
    """
    wanted = truth(environment, "MOSA_CUDA")
    if wanted is False:
        raise MissingError("left out on request (MOSA_CUDA=0)")
    try:
        nvcc = find_nvcc(environment)
        return Cuda(nvcc, choose_architectures(supported_architectures(nvcc), environment.get("TORCH_CUDA_ARCH_LIST")))
    except MissingError as why:
        if wanted:
            raise SetupError(f"MOSA_CUDA=1 asks for the CUDA kernels, but {why}") from why
        raise


def find_tools(environment: Mapping[str, str]) -> dict[str, str]:
    """Paths of cmake, ninja, pybind11's CMake files and the C++ compiler.

    Raises:
        MissingError: naming the first one that is not there, or that nothing is to be built.
    """
    if truth(environment, "MOSA_CPP") is False:
        raise MissingError("left out on request (MOSA_CPP=0)")
    cmake, ninja = find_program("cmake"), find_program("ninja")
    if cmake is None or ninja is None:
        raise MissingError(f"{'cmake' if cmake is None else 'ninja'} was not found (pip install cmake ninja pybind11)")
    if importlib.util.find_spec("pybind11") is None:
        raise MissingError("the Python package pybind11 was not found (pip install pybind11)")
    import pybind11

    compilers = [environment["CXX"].split()[0]] if environment.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for path in map(shutil.which, compilers) if path), None)
    if compiler is None:
        raise MissingError(f"no C++ compiler was found (looked for {', '.join(compilers)}; on Debian: apt install g++)")
    return {"cmake": str(cmake), "ninja": str(ninja), "pybind11": pybind11.get_cmake_dir(), "compiler": compiler}


def package_version() -> str:
    source = (ROOT / "mosa_kernels" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', source)
    assert match is not None
    return match[1]


def warn(message: str) -> None:
    """Says it on stderr, and on the terminal too, since pip hides the output of a build that succeeds."""
    text = f"\nmosa-kernels: WARNING: {message}\n\n"
    sys.stderr.write(text)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(text)


class CMakeBuild(build_ext):
    """Builds the one extension with CMake. What cannot be built leaves a package that works in pure Python."""

    def run(self) -> None:
        strict = truth(os.environ, "MOSA_STRICT") is True
        cuda_is_a_must = truth(os.environ, "MOSA_CUDA") is True
        target = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        record: dict[str, str | None] = {"native": None, "cuda": None}
        cuda: Cuda | None = None
        try:
            cuda = choose_cuda(os.environ)
        except MissingError as why:
            record["cuda"] = str(why)
        try:
            tools = find_tools(os.environ)
            if cuda is not None and not self.build_with_cuda(tools, cuda, target, cuda_is_a_must or strict):
                record["cuda"], cuda = f"the build with {cuda.nvcc} failed; see its output", None
                self.cmake_build(tools, None, target)
            elif cuda is None:
                self.cmake_build(tools, None, target)
        except (MissingError, subprocess.CalledProcessError) as error:
            missing = isinstance(error, MissingError)
            reason = str(error) if missing else "the build failed; see its output"
            if cuda_is_a_must or (strict and not missing):
                raise SetupError(f"mosa_kernels._C was not built: {reason}") from error
            Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)  # of an earlier build
            record["native"] = reason
            record["cuda"] = record["cuda"] or reason
            if truth(os.environ, "MOSA_CPP") is not False:
                warn(f"mosa_kernels._C was not built: {reason}.\nThe package works with its pure Python backends only.")
        partial = target / f"{BUILD_RECORD}.partial"
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(target / BUILD_RECORD)

    def build_with_cuda(self, tools: dict[str, str], cuda: Cuda, target: Path, must: bool) -> bool:
        """Whether the build with CUDA kernels worked; a failure is an error where they are a must."""
        try:
            self.cmake_build(tools, cuda, target)
            return True
        except subprocess.CalledProcessError as error:
            if must:
                raise SetupError(f"the build with {cuda.nvcc} failed; see the output above") from error
            warn(f"the build with {cuda.nvcc} failed; building without it (MOSA_CUDA=1 makes this an error).")
            return False

    def cmake_build(self, tools: dict[str, str], cuda: Cuda | None, target: Path) -> None:
        """Configures, compiles and installs `_C` into the target folder.

        Raises:
            subprocess.CalledProcessError: CMake or a compiler failed; their output is on the terminal.
        """
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CXX_COMPILER": tools["compiler"],
            "CMAKE_INSTALL_PREFIX": target,
            "CMAKE_MAKE_PROGRAM": tools["ninja"],
            "MOSA_VERSION": package_version(),
            "MOSA_WERROR": "ON" if truth(os.environ, "MOSA_STRICT") else "OFF",
            "MOSA_WITH_CUDA": "ON" if cuda else "OFF",
            "PYBIND11_FINDPYTHON": "ON",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": tools["pybind11"],
        }
        if cuda is not None:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
            options["CMAKE_CUDA_ARCHITECTURES"] = "OFF"
            options["MOSA_CUDA_ARCHITECTURES"] = " ".join(cuda.architectures)
            options["MOSA_CUDA_CODE"] = ";".join(code_flags(cuda.architectures, STEPS))
            options["MOSA_CUDA_CLUSTER_CODE"] = ";".join(code_flags(cuda.architectures, CLUSTER_STEPS))
            if "CXX" in os.environ and "CUDAHOSTCXX" not in os.environ:
                options["CMAKE_CUDA_HOST_COMPILER"] = tools["compiler"]
        folder = self.build_folder(tools, cuda)
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([tools["cmake"], "-S", ROOT, "-B", folder, "-G", "Ninja", *definitions], check=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run([tools["cmake"], "--build", folder, "--parallel", jobs], check=True)
        subprocess.run([tools["cmake"], "--install", folder], check=True)

    def build_folder(self, tools: dict[str, str], cuda: Cuda | None) -> Path:
        """One folder per interpreter and compiler: CMake cannot change them in a configured folder."""
        parts = (sys.base_prefix, sysconfig.get_config_var("SOABI"), tools["compiler"], cuda and cuda.nvcc)
        key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]
        base = ROOT / "build" / "native" if self.inplace else Path(self.build_temp).resolve()
        return base / f"{'cuda' if cuda else 'cpu'}-{key}"

    def get_outputs(self) -> list[str]:
        folder = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        return [str(path) for path in (*folder.glob("_C*.so"), folder / BUILD_RECORD) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(ext_modules=[Extension("mosa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
