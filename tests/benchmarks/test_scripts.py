"""The stems under pytest-benchmark, the calls for compute-sanitizer, and the script for a GPU, all on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import report
from script_modules import load_script

from mosa_kernels.bench.kernels import OPERATOR_NAMES
from mosa_kernels.bench.run import write
from mosa_kernels.bench.shapes import DTYPES
from mosa_kernels.train.folder import write_json

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, **more}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_there_is_a_stem_for_every_operator() -> None:
    for name in OPERATOR_NAMES:
        assert name == load_script(f"benchmarks/bench_{name}.py").OPERATOR


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
    module = load_script("benchmarks/small_calls.py")
    device = torch.device("cpu")
    monkeypatch.setattr(module, "available_backends", lambda: {"cpu": True, "triton": True, "cuda": True})
    names = [name for name, _ in module.calls(device)]
    for words in ("split, cpu", "in columns, triton", "sparse down, cuda", "in one launch, triton, fp16", "'r': 96"):
        assert any(words in name for name in names), words
    for dtype, options in module.LAYERS.values():
        module.layer("reference", DTYPES[dtype], device, **options)


def test_small_calls_have_dropout_with_a_seed_for_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script("benchmarks/small_calls.py")
    asked: list[dict[str, Any]] = []
    right = module.mosa_adapter
    monkeypatch.setattr(
        module, "mosa_adapter", lambda *args, **options: asked.append(options) or right(*args, **options)
    )
    for dtype, options in module.LAYERS.values():
        module.layer("reference", DTYPES[dtype], torch.device("cpu"), **options)
    (found,) = [options for options in asked if options["dropout_p"] > 0]
    assert found["dropout_p"] == 0.3
    assert found["seed"].shape == found["residual"].shape[:1]


@pytest.mark.parametrize("lost", [False, True])
def test_a_small_call_that_fails_leaves_the_others_unless_the_device_is_lost(
    lost: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = load_script("benchmarks/small_calls.py")

    def call(error: Exception | None = None) -> None:
        if error is not None:
            raise error

    out_of_resources, declined = RuntimeError("out of resource: shared memory"), ValueError("backend: not this one")
    found = [("first", call), ("second", lambda: call(out_of_resources)), ("third", lambda: call(declined))]
    monkeypatch.setattr(module, "calls", lambda device: iter([*found, ("last", call)]))
    monkeypatch.setattr(module, "is_lost", lambda device: lost)
    monkeypatch.setattr(sys, "argv", ["small_calls.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "failed: second: RuntimeError: out of resource: shared memory" in said
    assert "third" not in said
    assert said.endswith(f"{1 if lost else 2} calls ran, 1 failed\n")


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
    assert list(found) == ["doctor", "tests", "tests_alone", "small_calls", "choose", "bench", "granularity"]
    for name in ("doctor", "choose", "bench", "granularity", "small_calls"):
        assert found[name]["ended"] == "passed", found[name]
    for name in ("tests", "tests_alone"):
        assert found[name]["ended"] in ("passed", "no tests")
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
    assert "granularity is not run: its 50 s are not left" in done.stdout
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
        load_script("benchmarks/gpu_summary.py").main()
    assert (tmp_path / "summary.md").is_file()
    assert (tmp_path / "logs.tar.gz").is_file()


@pytest.mark.parametrize("earlier", [False, True])
def test_the_summary_shows_what_an_unfinished_run_has(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "phases.tsv").write_text("doctor\t0\t1\t9\n")
    (tmp_path / "logs" / "doctor.log").touch()
    if earlier:
        write(report(device="the earlier one"), tmp_path)
    write_json(tmp_path / "report.unfinished.json", report(device="the last one") | {"complete": False})
    monkeypatch.setattr(sys, "argv", ["gpu_summary.py", str(tmp_path)])
    load_script("benchmarks/gpu_summary.py").main()
    summary = (tmp_path / "summary.md").read_text()
    assert ("on the earlier one." if earlier else "on the last one. It was ended before it was done.") in summary
    assert ("They are of an earlier run; the last was ended" in summary) is earlier
    assert (tmp_path / "report.unfinished.json").exists() is earlier


def test_the_gpu_script_wants_a_folder() -> None:
    done = subprocess.run([BENCHMARKS / "gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: benchmarks/gpu.sh OUT" in done.stderr


@pytest.mark.parametrize("words", ["build test", "build,bench"])
def test_the_gpu_script_refuses_phases_that_it_does_not_have(words: str, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "MOSA_GPU_SH_DRY": "1", "MOSA_GPU_PHASES": words, "PYTHON": "false"}
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    wrong = words.split()[-1]
    assert f"MOSA_GPU_PHASES: expected some of build tests sanitizers bench, got {wrong}" in done.stderr
    assert not (tmp_path / "out").exists()


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
    assert load_script("benchmarks/gpu_summary.py").telling_line(text) == said


def test_every_file_with_tests_for_a_gpu_is_found() -> None:
    """By a word of its own, or as a user of the one helper that marks."""
    marks = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py") if "mark.gpu" in path.read_text()}
    assert marks == {"cuda_machine"}
    assert "|^from cuda_machine' tests" in (BENCHMARKS / "gpu.sh").read_text()


STUB = """#!/usr/bin/env bash
[[ "$*" == *get_device_capability* ]] && echo 9.0
[[ "$*" == *mem_get_info* ]] && echo 14
[[ "$*" == *gpu_summary.py* ]] && exec {python} "$@"
[[ "$*" == *pytest.main* ]] || exit 0
echo "ran $HYPOTHESIS_PROFILE $*"
[[ "$*" == *--deselect* ]] || exit 0
exec {python} -c "$2" -q -p no:cacheprovider {suite}
"""
HANGS = """
import time
def test_wrong(): assert False, "this was wrong"
def test_hangs(): time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it needs coreutils' timeout")
@pytest.mark.parametrize("ignoring", [False, True], ids=["in front", "in the background"])
def test_the_gpu_script_says_what_failed_in_tests_that_ran_out_of_time(ignoring: bool, tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, suite=tmp_path / "test_hangs.py"))
    stub.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(stub), "MOSA_GPU_PHASES": "tests bench", "MOSA_GPU_SECONDS": "12"}
    script = ["bash", "-c", f"{'trap {} INT; '.format(repr('')) if ignoring else ''}exec benchmarks/gpu.sh $0"]
    out = tmp_path / "out"
    done = subprocess.run([*script, out], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    phases = phases_of(out)
    assert phases["tests"]["ended"] == "out of time"
    assert phases["tests"]["said"].startswith("1 failed")
    assert "test_wrong - AssertionError: this was wrong" in (out / "summary.md").read_text()
    with tarfile.open(out / "logs.tar.gz") as archive:
        first, alone = (archive.extractfile(f"logs/{name}.log").read().decode() for name in ("tests", "tests_alone"))  # type: ignore[union-attr]
    assert first.startswith("ran gpu ")
    for words in ("-m gpu", "--deselect tests/bench/test_timing.py::", "-n 14", "tests/backends/triton/test_merge.py"):
        assert words in first
    assert "tests/backends/cuda/test_owned.py" in first
    assert "tests/benchmarks/test_scripts.py" not in first
    assert alone.rstrip().endswith("test_timing.py::test_times_on_a_gpu_are_those_of_the_device")
    assert "-n " not in alone
    for name in ("dram_bytes", "one_launch", "triton_three_launches", "triton_one_launch", "granularity"):
        assert f"{name} is not run: its " in done.stdout


NOTING = """#!/usr/bin/env bash
[[ "$*" == *get_device_capability* ]] && echo 9.0
[[ "$*" == *gpu_summary.py* ]] && exec {python} "$@"
echo "${{PYTORCH_NO_CUDA_MEMORY_CACHING:-cached}} ${{MOSA_TRITON_ONE_LAUNCH:-}} $*"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it needs coreutils' timeout")
@pytest.mark.parametrize(
    ("wanted", "seconds", "least"),
    [("build bench", None, 330), ("build tests sanitizers bench", None, 330), ("bench", "270", 170)],
)
def test_the_gpu_script_gives_every_phase_its_time(
    wanted: str, seconds: str | None, least: int, tmp_path: Path
) -> None:
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(NOTING.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("MOSA_GPU")}
    environment |= {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MOSA_GPU_PHASES": wanted} | ({} if seconds is None else {"MOSA_GPU_SECONDS": seconds})
    out = tmp_path / "out"
    done = subprocess.run([BENCHMARKS / "gpu.sh", out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    phases = phases_of(out)
    names = list(phases)
    checks = {"memcheck", "racecheck", "initcheck", "memcheck_one_launch", "synccheck_one_launch"}
    if "sanitizers" in wanted:
        assert names[:5] == ["build", "doctor", "tests", "tests_alone", "small_calls"]
        assert set(names[5:10]) == checks  # before anything is measured
        assert all(phases[name]["limit"] == 120 for name in checks)
    later = ["choose", "bench", "dram_bytes", "one_launch", "triton_three_launches", "triton_one_launch", "granularity"]
    assert names[-7:] == later
    assert phases["bench"]["limit"] >= least
    if seconds is None:  # what comes after it has its time, too
        assert sum(phases[name]["limit"] for name in later[1:]) in range(570 - 60, 571)
    with tarfile.open(out / "logs.tar.gz") as archive:
        said = {name: archive.extractfile(f"logs/{name}.log").read().decode() for name in names}  # type: ignore[union-attr]
    for name, text in said.items():  # what is measured keeps the allocator's cache
        assert text.startswith("1 " if name in checks | {"small_calls"} else "cached "), (name, text)
    for name, units in (("triton_one_launch", "16"), ("triton_three_launches", "0")):
        assert said[name].startswith(f"cached {units} ")
        for words in ("--only adapter_backward", "--bottlenecks 16", "--providers eager,triton"):
            assert words in said[name]


@pytest.mark.skipif(sys.platform != "linux", reason="it needs coreutils' timeout")
def test_a_build_that_went_on_without_cuda_failed_on_a_gpu(tmp_path: Path) -> None:
    """setup.py falls back, and pip shows nothing of a build that ends well: neither may pass for kernels that ran."""
    stub = tmp_path / "python"
    reason = "the CUDA kernels were not built: the build failed"
    lacking = f'[[ "$*" == *cuda_reason* ]] && {{ echo "{reason}" >&2; exit 1; }}'
    stub.write_text(f"{NOTING.format(python=sys.executable)}{lacking}\nexit 0\n")
    stub.chmod(0o755)
    environment = {**ENVIRONMENT, "PYTHON": str(stub), "MOSA_GPU_PHASES": "build"}
    done = subprocess.run([BENCHMARKS / "gpu.sh", tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = phases_of(tmp_path / "out")
    assert {name: phase["ended"] for name, phase in found.items()} == {"build": "failed", "doctor": "passed"}
    assert found["build"]["said"] == reason
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        assert b"-m pip install --verbose " in archive.extractfile("logs/build.log").read()  # type: ignore[union-attr]


@pytest.mark.parametrize(("profile", "most"), [("ci", 40), ("gpu", 10)])
def test_a_profile_limits_the_examples_of_every_test(profile: str, most: int, tmp_path: Path) -> None:
    suite = (
        "from hypothesis import given, settings, strategies as st\n"
        "seen = []\n"
        "@settings(max_examples=40)\n@given(st.integers())\ndef test_any(n): seen.append(n)\n"
        f"def test_after(): assert len(seen) == {most}\n"
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_any.py").write_text(suite)
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, HYPOTHESIS_PROFILE=profile)
    assert done.returncode == 0, done.stdout


HEAD = """==PROF== Connected
counted forward 300000
counted backward 0
counted both 500000
==PROF== Disconnected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"""
READ, WRITE = "dram__bytes_read.sum", "dram__bytes_write.sum"
KERNELS = (
    ("at::cuda::(anonymous namespace)::spin_kernel(long)", READ, "7"),
    ("adapter_forward_kernel", READ, "100,000"),
    ("adapter_forward_kernel", WRITE, "50,000"),
    ("reduce_kernel", READ, "1,000"),
    ("reduce_kernel", "other", "9"),
)


def ncu(directions: int) -> str:
    """What Nsight Compute prints where each direction launches the same two kernels."""
    rows: list[str] = []
    number = -1
    for _ in range(directions):
        before = ""
        for kernel, metric, value in KERNELS:
            number, before = number + (kernel != before), kernel
            rows.append(f'"{number}","7","{kernel}","Command line profiler metrics","{metric}","byte","{value}"')
    return HEAD + "\n".join(rows) + "\n"


def test_bytes_that_memory_moved_are_added_up_for_each_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_script("benchmarks/dram_bytes.py")
    assert module.totals(ncu(3)) == [(151_000, 2)] * 3
    with pytest.raises(ValueError, match="expected a table of metrics"):
        module.totals("==ERROR== no permission")
    with pytest.raises(ValueError, match="expected the kernel spin_kernel first"):
        module.totals(ncu(1).replace("spin_kernel", "elementwise"))
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess([], 0, stdout=ncu(3), stderr="")

    monkeypatch.setattr(module.subprocess, "run", run)
    row, backward, both = module.measure("vit_b", 128, "triton", "ncu")
    assert row == {
        "operator": "adapter_forward", "provider": "triton", "read": 151_000, "kernels": 2, "counted": 300_000,
    }  # fmt: skip
    assert (backward["operator"], backward["counted"]) == ("adapter_backward", None)
    assert (both["operator"], both["counted"]) == ("adapter", 500_000)
    assert "--profile-from-start off" in " ".join(asked[0])
    written: list[int] = []
    monkeypatch.setattr(module, "write_json", lambda _, made: written.append(len(made["rows"])))
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(sys, "argv", ["dram_bytes.py", "out.json"])
    module.main()
    assert written == [3, 6, 9]  # after each provider, should time run out
    missing = {"operator": "adapter", "provider": "cuda", "reason": "not here"}
    section = load_script("benchmarks/gpu_summary.py").moved_section(
        {"case": {"shape": "vit_b"}, "rows": [row, missing]}
    )
    assert "| adapter_forward | triton | 2 | 0.2 | 0.3 | 0.50 |" in section
    assert "| adapter | cuda | - | not here | - | - |" in section


@pytest.mark.parametrize(
    ("rc", "stdout", "stderr", "reason"),
    [
        (3, "==PROF== Connected\nnot built: there is no compiler\n", "", "there is no compiler"),
        (
            1,
            "not built: the application's status is not always ncu's\n",
            "",
            "the application's status is not always ncu's",
        ),
        (3, "", "", "not built"),
        (1, "", "a warning\n==ERROR== ERR_NVGPUCTRPERM\n", "==ERROR== ERR_NVGPUCTRPERM"),
        (1, "==ERROR== no counters\n", "", "==ERROR== no counters"),
        (0, "", "", "ncu: expected a table of metrics, got none"),
        (0, ncu(2), "", "ncu: expected 3 calls, got 2"),
    ],
)
def test_why_no_bytes_were_counted(
    rc: int, stdout: str, stderr: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_script("benchmarks/dram_bytes.py")
    done = subprocess.CompletedProcess([], rc, stdout=stdout, stderr=stderr)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    assert [row["reason"] for row in module.measure("vit_b", 128, "cuda", "ncu")] == [reason] * 3


def test_a_provider_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script("benchmarks/dram_bytes.py")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(SystemExit) as raised:
        module.run_once(module.Point(), "merged dense" if torch.cuda.is_available() else "cuda")
    assert raised.value.code == 3
    assert capsys.readouterr().out.startswith(module.NOT_BUILT)
