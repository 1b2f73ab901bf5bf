"""The operators beside the adapter in Triton's interpreter, in a process of their own, as in test_interpreter.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch came without Triton")


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    folder = Path(__file__).parent
    suites = [str(folder / f"test_{stem}.py") for stem in ("masked_adamw", "merge", "alignment", "consistency")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *suites]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder.parents[2], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout.splitlines()[-1]
