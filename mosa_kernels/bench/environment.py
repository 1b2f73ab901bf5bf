"""Where and with what a report was made."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mosa_kernels._extension import extension
from mosa_kernels._machine import available_cores, machine
from mosa_kernels.train.folder import versions

COMMIT_VARIABLE = "MOSA_COMMIT"
KEEPS_MEMORY = "glibc's, told to keep freed memory (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_)"
_GPU_FIELDS = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "most_sm_clock": "clocks.max.sm",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def choose_device(name: str | None) -> torch.device:
    """The device asked for, by default a GPU where there is one.

    Raises:
        ValueError: it is none, or not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that is there, got cuda, and PyTorch sees no CUDA device")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def keep_memory() -> bool:
    """Has the C library keep the memory that PyTorch frees on a CPU; False: it is not glibc.

    By default large blocks go back to the system, and every call that takes new ones pays for their pages again, or
    does not, as the calls before it had it: eager PyTorch's time in one process then differs by two.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # <malloc.h>
    return bool(library.mallopt(trim_threshold, 2**31 - 1) and library.mallopt(mmap_threshold, 2**30))


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit, ready for JSON. Call it while the device is warm: clocks count."""
    built = extension()
    info: dict[str, Any] = {} if built.module is None else dict(built.module.build_info)
    compiled = built.reason
    if built.module is not None:
        fastest = built.module.adapter_cpu_fastest_instruction_set(bf16_products=True)
        compiled = f"{', '.join(built.module.adapter_cpu_instruction_sets())} (in bf16 {fastest})"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "device_type": device.type,
        "cpu": machine(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiled_cpu_kernels": compiled,
        "compiled_cuda_kernels": built.cuda_reason or info.get("cuda_architectures"),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "versions": {
            **versions(),
            "triton": _version("triton"),
            "peft": _version("peft"),
            "cuda": torch.version.cuda,
        },
        "tf32": torch.backends.cuda.matmul.fp32_precision if device.type == "cuda" else None,
        "commit": commit(),
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the clone that the package runs from, "+" for local changes; else what MOSA_COMMIT says."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        head, changes = (
            _output("git", "-C", root, "rev-parse", "HEAD"),
            _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no"),
        )
        if head is not None:
            return head + ("+" if changes else "")
    return os.environ.get(COMMIT_VARIABLE) or None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }
    answer = _output(
        "nvidia-smi",
        f"--query-gpu={','.join(_GPU_FIELDS.values())}",
        "--format=csv,noheader",
        f"--id={_smi_id(properties, device)}",
    )
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return {**found, **dict(zip(_GPU_FIELDS, values, strict=False))}


def _smi_id(properties: Any, device: torch.device) -> str:
    """CUDA_VISIBLE_DEVICES renumbers devices for PyTorch and not for nvidia-smi; the UUID holds for both."""
    uuid = str(getattr(properties, "uuid", ""))
    return f"GPU-{uuid.removeprefix('GPU-')}" if uuid else str(device.index or 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str | Path) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
