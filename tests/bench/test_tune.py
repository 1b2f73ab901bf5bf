"""The table of tile sizes measured anew, in Triton's interpreter: what it prints is the form of the table."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from mosa_kernels.backends.choice import available_backends
from mosa_kernels.backends.triton.configs import Config
from mosa_kernels.bench.shapes import Axes
from mosa_kernels.bench.tune import KERNELS, ROWS, grid, list_tuning, tune, tuning_points

INTERPRETED = """
import interpreter
import torch
from mosa_kernels.backends.triton.configs import Config
from mosa_kernels.bench.shapes import MODELS, Point
from mosa_kernels.bench.tune import tune_row

MODELS["tiny"] = (16, 32)
said = []
point = Point("tiny", 1, 8, 2, "fp32", "call")
print(tune_row(point, torch.device("cpu"), [Config(16, 16, 4, 1)], said.append, seconds=0))
print("\\n".join(said))
"""


def test_a_row_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    if "No module named 'triton'" in done.stderr:
        pytest.skip("triton is not installed")
    assert done.returncode == 0, done.stderr
    row, *said = done.stdout.splitlines()
    config = r"Config\(\d+, \d+, \d+, \d+\)"
    match = re.fullmatch(rf"    16: \(({config}), ({config}), ({config})\),  # (.*)", row)
    assert match is not None, row
    assert all(f"{kernel} " in match[4] for kernel in KERNELS)
    assert len(said) == 2 * len(KERNELS)  # the present choice and the one candidate, for each kernel
    assert all(" ms" in line for line in said), said


def test_a_dry_run_lists_every_row_and_measures_nothing() -> None:
    text = list_tuning(Axes())
    for row in ROWS:
        assert f"r {row}, bf16" in text
        assert f"r {row}, fp32" in text
    assert "Config(64, 64, 8, 3)" in text
    assert [point.bottleneck for point in tuning_points(Axes(bottleneck=(64,), dtype=("bf16",)))] == [64]


def test_the_grid_holds_no_tile_that_cannot_fit() -> None:
    assert Config(128, 128, 8, 3) in grid(64)
    assert all(tiles.block_t * 256 <= 128 * 256 for tiles in grid(256))
    assert len(grid(64)) == len(set(grid(64)))


def test_without_a_gpu_the_reason_is_told() -> None:
    if available_backends()["triton"] is True:
        pytest.skip("the Triton backend is available")
    with pytest.raises(ValueError, match="tune: expected the Triton backend, which is not available"):
        tune(Axes(), lambda line: None)
