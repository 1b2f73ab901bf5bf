"""The one place that imports the compiled module `mosa_kernels._C`, and remembers why where it cannot.

Importing this module needs neither PyTorch nor a GPU and never fails.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from mosa_kernels.version import __version__

BUILD_RECORD = Path(__file__).with_name("_build.json")


class Extension(NamedTuple):
    """The compiled module, or the reasons why it, or its CUDA half, is not there."""

    module: ModuleType | None
    reason: str | None  # None: the C++ kernels are there
    cuda_reason: str | None  # None: the CUDA kernels are there (whether a GPU is, is another question)


def _build_record() -> dict[str, str | None]:
    """What the build left out, as setup.py wrote it: reasons under "native" and "cuda"."""
    try:
        return json.loads(BUILD_RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


@cache
def extension() -> Extension:
    """Imports `_C` once.

    A module of another version than the package's is refused: it is a leftover of an earlier build, and its
    functions may take other arguments.
    """
    try:
        module = importlib.import_module("mosa_kernels._C")
    except ImportError as error:
        reason = _why_not_imported(error)
        return Extension(None, reason, reason)
    built_for = module.build_info["version"]
    if built_for != __version__:
        reason = f"mosa_kernels._C was built for version {built_for}, this is {__version__}: build it again"
        return Extension(None, reason, reason)
    if module.build_info["cuda_toolkit"]:
        return Extension(module, None, None)
    recorded = _build_record().get("cuda") or "nvcc was not found"
    return Extension(module, None, f"the CUDA kernels were not built: {recorded}")


def _why_not_imported(error: ImportError) -> str:
    built = [path.name for path in sorted(BUILD_RECORD.parent.glob("_C*.so"))]
    if any(name.removeprefix("_C") in EXTENSION_SUFFIXES for name in built):
        return f"mosa_kernels._C does not load: {error}"
    if built:  # Python passes over the modules of others
        here = f"{sys.version.split()[0]}, which loads _C{EXTENSION_SUFFIXES[0]}"
        return f"mosa_kernels._C was built for another Python ({', '.join(built)}), this is {here}: build it again"
    recorded = _build_record().get("native")
    if recorded:
        return f"mosa_kernels._C was not built: {recorded}"
    return "mosa_kernels._C was not built (pip install . or, in a clone, make build)"


def why_no_code_for(capability: tuple[int, int], made_for: tuple[int, int] = (0, 0)) -> str | None:
    """Why a GPU of this compute capability cannot run the CUDA kernels that were built; None where it can.

    PTX needs a driver that is at least as new as the toolkit, which machine code does not: of the same major version,
    the driver runs whatever it is.

    Args:
        capability: major and minor version.
        made_for: only code for this compute capability and later ones counts.
    """
    module = extension().module
    built_for = [] if module is None else module.build_info["cuda_architectures"].split()
    if runs_on(capability, [each for each in built_for if each.endswith("-real")], made_for):
        return None
    reason = "the CUDA kernels were not built for sm_{}{}".format(*capability)
    if module is None or not runs_on(capability, built_for, made_for):
        return reason
    toolkit, driver = module.build_info["cuda_toolkit"], cuda_version(module.cuda_driver_version())
    if _numbers(driver) >= _numbers(toolkit)[:2]:
        return None
    return f"{reason}, and the driver, which is for CUDA {driver}, does not compile PTX of CUDA {toolkit}"


def cuda_version(number: int) -> str:
    """CUDA's 13020 as 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def runs_on(capability: tuple[int, int], architectures: list[str], made_for: tuple[int, int] = (0, 0)) -> bool:
    """Whether a GPU runs code built for these architectures, spelled as CMake does (80-real, 120-virtual).

    Machine code runs on the same major version from its minor version on; PTX runs on everything newer.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)-(real|virtual)", architecture)
        if match is None:
            continue
        built, specific = (int(match[1]), int(match[2])), match[3]
        if built < made_for:
            continue
        same_family = built[0] == capability[0] and built[1] <= capability[1]
        if specific == "a":
            runs = built == capability
        elif specific == "f" or match[4] == "real":
            runs = same_family
        else:
            runs = built <= capability
        if runs:
            return True
    return False
