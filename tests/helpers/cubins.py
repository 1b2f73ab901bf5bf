"""What compiled kernels take of a GPU, as NVIDIA's cuobjdump reads it off the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(")
PLAIN = " of plain calls"
"""What is added to the name of a kernel that takes PlainParams of csrc/adapter_plain.h."""
_SPILLS = ("STACK", "LOCAL")
_FIRST_RESERVING, _RESERVED = 90, 1024  # from sm_90 on the system keeps shared memory of every block to itself


class Usage(NamedTuple):
    architecture: str  # sm_80
    kernel: str
    registers: int
    stack: int  # bytes a thread: what did not fit into registers, and arrays with computed indices
    shared: int  # bytes a block, without what a launch adds


def find_cuobjdump() -> str | None:
    """Of the CUDA toolkit, else the one that comes with Triton."""
    if on_path := shutil.which("cuobjdump"):
        return on_path
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "cuobjdump" for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in candidates if path.is_file()), None)


def resource_usage(binary: Path) -> list[Usage]:
    """Of every kernel in a cubin, or in an object or library with kernels for several architectures."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    command = [cuobjdump, "--dump-resource-usage", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, architecture, kernel = [], "", ""
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*arch = (sm_\w+)\s*", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = kernel_name(match[1])
        elif kernel and "REG:" in line:
            number = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            stack = sum(number[name] for name in _SPILLS)
            found.append(Usage(architecture, kernel, number["REG"], stack, _own_shared(architecture, number["SHARED"])))
            kernel = ""
    return found


def _own_shared(architecture: str, shared: int) -> int:
    number = re.search(r"\d+", architecture)
    reserved = _RESERVED if number is not None and int(number[0]) >= _FIRST_RESERVING else 0
    return max(0, shared - reserved)  # 0 is reported where a kernel has none of its own


def kernel_name(symbol: str) -> str:
    """The function's own name in a mangled one: `split_kernel` of `_ZN4mosa12split_kernelE...`; with `PLAIN`."""
    match = re.match(r"_ZN?", symbol)
    if match is None:
        return symbol
    rest, name = symbol[match.end() :], symbol
    while part := re.match(r"(\d+)", rest):
        end = part.end() + int(part[1])
        name, rest = rest[part.end() : end], rest[end:]
    return name + PLAIN if "11PlainParams" in symbol else name


def kernels_of(source: Path) -> set[str]:
    """The kernels that a file of csrc defines."""
    return set(KERNEL.findall(source.read_text(encoding="utf-8")))


def kernel_sources() -> dict[str, Path]:
    """Every kernel of csrc with the file that defines it."""
    files = [*CSRC.glob("*.cu"), *CSRC.glob("*.h"), *CSRC.glob("*.cuh")]
    return {kernel: path for path in sorted(files) for kernel in kernels_of(path)}
