"""Triton's launcher, that of the version at hand, is given what it expects; and a graph may be captured first thing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch came without Triton")

HERE = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("clang")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs a C compiler, and Linux's libcuda"),
    pytest.mark.skipif(
        not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        reason="Triton builds its launcher with Python.h",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the stub lies, and what is compiled for it."""
    folder = tmp_path_factory.mktemp("driver")
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "stub_driver.c")], check=True)  # type: ignore[list-item]
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # Triton 3.5 links to it by this name
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["launches", "captured", "old driver"])
def test_on_a_driver_that_notes_its_launches(scenario: str, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "stub_driver.py"), str(folder / "libcuda.so.1"), scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
