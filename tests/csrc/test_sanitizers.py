"""The kernels on the host again, with every access watched: whether it is out of bounds, and what orders it.

Tests under the address sanitizer run in a process of their own, since its runtime has to be there before Python is. All
memory of tensors is then fenced in, and so are the variables of threads and shared memory whose size a launch names.
Arrays of shared memory are watched wherever kernels run on the host, by the sanitizer of undefined behaviour. Races
are found by cuda_on_host/races.h, in whatever order the threads happen to run.
"""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cubins
import cuda_on_host
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {watch: cuda_on_host.watching_environment(watch) for watch in ("addresses", "races")}
pytestmark = pytest.mark.slow


class Selection(NamedTuple):
    """Tests that run the kernels of a file on the host, chosen for sizes and addresses that do not fit."""

    file: str
    names: str  # as pytest's -k takes them


TESTS = {
    "merge.cu": Selection("tests/functional/test_merge.py", "cuda_on_host and (many_adapters or leaves_inputs_alone)"),
    "split.cu": Selection("tests/functional/test_split.py", "cuda_on_host and large_splits"),
    "masked_adamw.cu": Selection(
        "tests/csrc/test_masked_adamw.py", "cuda_on_host and (off_the_vectors or many_blocks)"
    ),
}
ELSEWHERE = {"adapter_*.cu": "tests/backends/cuda/test_adapter.py::test_kernels_are_watched"}
"""What runs like that from a test of its own."""


def run(watch: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENTS[watch]
    if environment is None:
        pytest.skip(f"no C++ compiler that watches {watch}")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    environment = {**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_file_with_kernels_has_tests() -> None:
    files = {path.name for path in cubins.CSRC.glob("*.cu")} - {"cuda_device.cu"}
    patterns = (*TESTS, *ELSEWHERE)
    missing = [name for name in sorted(files) if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not missing, f"files without a row in TESTS of {Path(__file__).name}: {missing}"
    for test in ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("watch", ENVIRONMENTS)
def test_kernels_are_watched(watch: str) -> None:
    files = [tests.file for tests in TESTS.values()]
    names = " or ".join(f"({tests.names})" for tests in TESTS.values())
    answer = run(watch, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", names)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-8000:]
    assert "SKIPPED" not in answer.stdout
    for file in files:
        assert any(line.startswith(f"{file}::") and "PASSED" in line for line in answer.stdout.splitlines()), file


SPLIT = """
import cuda_on_host, torch
module = cuda_on_host.build("split", {changes!r}, watch={watch!r})
owners = torch.empty({size}, dtype=torch.uint8)
module.split_cuda(owners.data_ptr(), 0, 5, (6, 10, 4, 60, 1, 0, 0, 10, 1), 0, 0)
print("the kernel came to its end")
"""
SHARED = "__shared__ int all[9]; (&all[0])[threadIdx.x % 12] = 1; uint32_t place ="


@pytest.mark.parametrize(
    ("changes", "size", "watch", "complaint"),
    [
        ({}, 60, "addresses", None),
        ({"split.cu": ("if (entry >= ", "if (entry > ")}, 60, "addresses", "heap-buffer-overflow"),
        ({}, 59, "addresses", "heap-buffer-overflow"),
        ({}, 60, "behaviour", None),
        ({"split.cu": ("uint32_t place =", SHARED)}, 60, "behaviour", "insufficient space"),
    ],
    ids=["right", "one entry too many", "a tensor too small", "right shared memory", "shared memory"],
)  # fmt: skip
def test_an_access_out_of_bounds_is_found(
    changes: dict[str, tuple[str, str]], size: int, watch: str, complaint: str | None
) -> None:
    """A test of these tests."""
    answer = run("addresses", "-c", SPLIT.format(changes=changes, size=size, watch=watch))
    if complaint is None:
        assert answer.returncode == 0, answer.stderr[-4000:]
        assert "came to its end" in answer.stdout
    else:
        assert answer.returncode != 0
        assert complaint in answer.stderr
        assert "came to its end" not in answer.stdout


@pytest.mark.skipif(ENVIRONMENTS["races"] is None, reason="no C++ compiler that watches races")
def test_a_data_race_is_found(tmp_path: Path) -> None:
    """A test of these tests: of each kernel of racy_kernels.cu the right form passes, and the other does not."""
    program = cuda_on_host.build_program(cuda_on_host.STAND_IN / "racy_kernels.cu", "races", tmp_path)
    answer = subprocess.run([program], capture_output=True, text=True, check=True)
    said = [tuple(line.split(": ", 1)) for line in answer.stdout.splitlines()]
    assert len(said) == 22
    for kernel, found in said:
        name, form = kernel.split(", ")
        if form == "right":
            assert found == "-", kernel
            continue
        if name == "read_of_what_nobody_wrote":
            assert found.startswith(
                "a read of memory that nobody has written by thread 0 of block (0, 0) at racy_kernels"
            )
            continue
        memory = "global" if name in ("between_blocks", "by_ticket") else "shared"
        assert found.startswith(f"a data race in {memory} memory: a "), (kernel, found)
        assert found.endswith(", in no order")
        assert "racy_kernels.cu:" in found
    assert "an asynchronous copy that nobody has waited for" in answer.stdout
