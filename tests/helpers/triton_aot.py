"""What the assembler says about a Triton kernel compiled for a GPU that need not be there."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from mosa_kernels.backends.triton.launch import Launch

SMALL_SHARED = 99 * 1024  # bytes a block may use on compute capability 8.6, 8.9 and 12.x


class MachineCode(NamedTuple):
    ptx: str
    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a block


def machine_code(launch: Launch, arch: int, scratch: Path) -> MachineCode:
    """Compiles the launch for compute capability arch / 10; its tensors may be on the meta device."""
    kernel: Any = launch.compile(GPUTarget("cuda", arch, 32), SMALL_SHARED)
    return MachineCode(kernel.asm["ptx"], *registers_and_spills(kernel, arch, scratch), kernel.metadata.shared)


def registers_and_spills(kernel: Any, arch: int, scratch: Path) -> tuple[int, int]:
    """As the assembler reports them: registers a thread, bytes spilled a thread."""
    source = scratch / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)
    assert target is not None
    takes_arch = bool(inspect.signature(nvidia.get_ptxas).parameters)  # not in Triton 3.5
    assembler = nvidia.get_ptxas(arch) if takes_arch else nvidia.get_ptxas()
    command = [assembler.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(scratch / "kernel.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert used is not None
    assert spilled is not None
    return int(used[1]), max(map(int, spilled.groups()))
