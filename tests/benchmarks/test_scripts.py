"""The stems under pytest-benchmark, the calls for compute-sanitizer, and the script for a GPU, all on a CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mosa_kernels.bench.kernels import OPERATOR_NAMES
from mosa_kernels.bench.shapes import DTYPES

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **more}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_there_is_a_stem_for_every_operator() -> None:
    for name in OPERATOR_NAMES:
        assert name == load(f"bench_{name}").OPERATOR


def test_stems_run_under_pytest_benchmark() -> None:
    done = python("-m", "pytest", "-q", BENCHMARKS, "--benchmark-disable", "-p", "no:cacheprovider", "-rs")
    assert done.returncode == 0, done.stdout
    passed, skipped = (int(word.split()[0]) for word in done.stdout.splitlines()[-1].split(", ")[:2])
    assert passed >= 3 * len(OPERATOR_NAMES)
    assert skipped > 0
    assert "there is no CUDA device" in done.stdout or "triton" in done.stdout


def test_a_stem_is_a_script(tmp_path: Path) -> None:
    words = ("--preset", "smoke", "--device", "cpu", "--rounds", "3", "--output", tmp_path)
    done = python(BENCHMARKS / "bench_merge.py", *words)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "report.json").read_text())
    assert {record["operator"] for record in made["kernels"]} == {"merge"}


def test_tuning_is_a_module(tmp_path: Path) -> None:
    done = python("-m", "benchmarks.tune_triton", "--dry-run", "--bottlenecks", "128")
    assert done.returncode == 0, done.stderr
    assert "r 128, bf16" in done.stdout


def test_small_calls_reach_what_no_point_has(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("small_calls")
    device = torch.device("cpu")
    monkeypatch.setattr(module, "available_backends", lambda: {"cpu": True, "triton": True, "cuda": True})
    names = [name for name, _ in module.calls(device)]
    for words in ("split, cpu", "in columns, triton", "sparse down, cuda", "in one launch, triton, fp16", "'r': 96"):
        assert any(words in name for name in names), words
    for dtype, options in module.LAYERS.values():
        module.layer("reference", DTYPES[dtype], device, **options)


def phases_of(output: Path) -> dict[str, dict[str, Any]]:
    """How each phase of gpu.sh ended."""
    with tarfile.open(output / "logs.tar.gz") as archive:
        file = archive.extractfile("logs/phases.json")
        assert file is not None
        return {phase["phase"]: phase for phase in json.load(file)["phases"]}


@pytest.mark.skipif(sys.platform != "linux", reason="it needs coreutils' timeout")
def test_the_gpu_script_goes_through_its_phases(tmp_path: Path) -> None:
    output = tmp_path / "what's out"
    environment = {**ENVIRONMENT, "MOSA_GPU_SH_DRY": "1", "PYTHON": sys.executable}
    done = subprocess.run([BENCHMARKS / "gpu.sh", output], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = phases_of(output)
    assert list(found) == ["doctor", "tests", "choose", "bench", "granularity", "small_calls"]
    for name in ("doctor", "choose", "bench", "granularity", "small_calls"):
        assert found[name]["ended"] == "passed", found[name]
    assert found["tests"]["ended"] in ("passed", "no tests")
    assert found["small_calls"]["said"].endswith(", 0 failed")
    files = {path.name for path in output.iterdir()}
    assert {"summary.md", "report.json", "report.md", "kernels.png", "choice", "logs.tar.gz"} <= files
    assert len([path for path in output.rglob("*") if path.is_file()]) <= 8  # few enough to send
    with tarfile.open(output / "logs.tar.gz") as archive:
        assert {"logs/bench.log", "logs/granularity/report.json"} <= set(archive.getnames())
    summary = (output / "summary.md").read_text()
    assert "| cpu, column | " in summary
    assert "## Goals" not in summary  # the smallest shapes decide none
    (table,) = (output / "choice").iterdir()
    assert json.loads(table.read_text())["complete"]
    assert f"choice/{table.name}" in summary
    assert "| masked_adamw | " in summary


def test_the_gpu_script_outlives_phases_that_run_out_of_time(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "MOSA_GPU_SH_DRY": "1", "MOSA_GPU_SECONDS": "0", "PYTHON": sys.executable}
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "| bench | out of time | 124 |" in (tmp_path / "summary.md").read_text()
    phases = phases_of(tmp_path)
    assert len(phases) == 6
    assert {phase["ended"] for phase in phases.values()} == {"out of time"}
    assert all(phase["limit"] == 1 for phase in phases.values())


@pytest.mark.parametrize(
    ("phase", "rc", "status"), [("choose", 1, 1), ("bench", 1, 1), ("tests", 5, 0), ("dram_bytes", 1, 0)]
)
def test_the_summary_ends_with_an_error_where_a_phase_failed(
    phase: str, rc: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "phases.tsv").write_text(f"doctor\t0\t1\t9\n{phase}\t{rc}\t1\t9\n")
    for name in ("doctor", phase):
        (tmp_path / "logs" / f"{name}.log").write_text("the last line")
    monkeypatch.setattr(sys, "argv", ["gpu_summary.py", str(tmp_path)])
    with pytest.raises(SystemExit) if status else contextlib.nullcontext():
        load("gpu_summary").main()
    assert (tmp_path / "summary.md").is_file()
    assert (tmp_path / "logs.tar.gz").is_file()


def test_the_gpu_script_wants_a_folder() -> None:
    done = subprocess.run([BENCHMARKS / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: benchmarks/gpu.sh OUT" in done.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n========= ERROR SUMMARY: 0 errors\nb", "ERROR SUMMARY: 0 errors"),
        ("x\n===== 3 failed, 4 passed in 5s =====\n", "3 failed, 4 passed in 5s"),
        ("first\nlast\n", "last"),
        ("", ""),
    ],
)
def test_the_line_that_says_most(text: str, said: str) -> None:
    assert load("gpu_summary").telling_line(text) == said


NCU = """==PROF== Connected
counted 300000
==PROF== Disconnected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","adapter_forward_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","100,000"
"0","7","adapter_forward_kernel","Command line profiler metrics","dram__bytes_write.sum","byte","50,000"
"1","7","reduce_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","1,000"
"1","7","reduce_kernel","Command line profiler metrics","other","byte","9"
"""


def test_bytes_that_memory_moved_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("dram_bytes")
    assert module.total(NCU) == (151_000, 2)
    with pytest.raises(ValueError, match="expected a table of metrics"):
        module.total("==ERROR== no permission")
    done = subprocess.CompletedProcess([], 0, stdout=NCU)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    row = module.measure("vit_b", 128, "forward", "triton", "ncu")
    assert row == {
        "operator": "adapter_forward", "provider": "triton", "read": 151_000, "kernels": 2, "counted": 300_000,
    }  # fmt: skip
    written: list[int] = []
    monkeypatch.setattr(module, "write_json", lambda _, made: written.append(len(made["rows"])))
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["dram_bytes.py", "out.json"])
    module.main()
    assert written == list(range(1, 10))  # after each of them, should time run out
    missing = {"operator": "adapter", "provider": "cuda", "reason": "not here"}
    section = load("gpu_summary").moved_section({"case": {"shape": "vit_b"}, "rows": [row, missing]})
    assert "| adapter_forward | triton | 2 | 0.2 | 0.3 | 0.50 |" in section
    assert "| adapter | cuda | - | not here | - | - |" in section
