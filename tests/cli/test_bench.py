"""`mosa-kernels bench` from end to end on the smallest shapes, comparisons, and wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reports import record, report, row

from mosa_kernels.backends import measured
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.choice import choose_adapter_backend
from mosa_kernels.bench import run
from mosa_kernels.bench.kernels import OPERATOR_NAMES
from mosa_kernels.bench.run import PARTS, Request, Say, read, write
from mosa_kernels.cli import bench
from mosa_kernels.train.folder import write_json

SMOKE = ("bench", "--preset", "smoke", "--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_everything_is_measured_and_written(command, tmp_path: Path) -> None:
    output = tmp_path / "report"
    result = command(*SMOKE, "--output", output)
    assert result.exit_code == 0, result.output
    made = json.loads((output / "report.json").read_text())
    assert {r["operator"] for r in made["kernels"]} == set(OPERATOR_NAMES)
    assert {r["axis"] for r in made["growth"]} == {"tokens", "bottleneck r", "experts N", "adapters"}
    assert made["models"][0]["training"]
    rows = [r for part in ("kernels", "growth") for each in made[part] for r in each["rows"]]
    assert all(r["status"] in ("ok", "unavailable") for r in rows)
    assert all(("ms" in r) == (r["status"] == "ok") for r in rows)
    assert all(r["reason"] for r in rows if r["status"] == "unavailable")
    ours = [r for r in rows if r["provider"] == "cpu" and "ms" in r]
    assert len(ours) >= 10
    for each in ours:
        assert each["ms"]["smallest"] <= each["ms"]["p20"] <= each["ms"]["median"] <= each["ms"]["p80"]
        assert each["error"]["relative"] <= 2 * each["error"]["eager"] + 1e-6
    machine = made["machine"]
    assert machine["threads"] == 1
    assert machine["device_type"] == "cpu"
    assert machine["versions"]["torch"]
    text = (output / "report.md").read_text()
    for heading in (
        "## Kernels",
        "### Adapter, forward",
        "## Whole models",
        "## How cost grows",
        "open a pull request",
    ):
        assert heading in text
    for name in ("kernels.png", "models.png", "growth.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert str(output / "report.json") in result.stdout.replace("\n", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_everything_is_measured_on_a_gpu(command, tmp_path: Path) -> None:
    result = command("bench", "--preset", "smoke", "--device", "cuda", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "report.json").read_text())
    timed = [r for each in made["kernels"] for r in each["rows"] if "ms" in r]
    assert {"triton", "cuda"} & {r["provider"] for r in timed}
    assert all(r["peak_bytes"] >= 0 and r["host_us"]["wall"] > 0 for r in timed)
    assert made["machine"]["gpu"]["name"] in made["machine"]["device"]


def test_one_part_with_chosen_shapes_and_providers(command, tmp_path: Path) -> None:
    result = command(
        *SMOKE, "--only", "adapter", "--shapes", "swin_b_4", "--images", "1,2", "--bottlenecks", "8",
        "--dtypes", "bf16", "--expert-per", "call", "--providers", "eager,N copies,cpu", "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "report.json").read_text())
    assert [r["case"]["shape"] for r in made["kernels"]] == ["swin_b_4, 1 x 49", "swin_b_4, 2 x 49"]
    assert [[x["provider"] for x in r["rows"]] for r in made["kernels"]] == [["eager", "N copies", "cpu"]] * 2
    assert made["growth"] == made["models"] == []


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("no such sensor"), 1)])
def test_a_run_that_ends_early_leaves_a_finished_report_alone_and_says_what_it_has(
    error: BaseException, status: int, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(report(record("adapter", [row("eager", 2.0), row("cpu", 1.0, True)]), device="a CPU"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def measure(request: Request, say: Say, keep: Callable[[dict], None]) -> dict:
        keep(report(record("merge", [row("eager", 3.0)])) | {"complete": False})
        raise error

    monkeypatch.setattr(bench, "measure", measure)
    result = command(*SMOKE, "--only", "merge", "--output", tmp_path)
    assert result.exit_code == status
    unfinished = tmp_path / "report.unfinished.json"
    assert f"what was measured until then is in {unfinished}" in result.stdout.replace("\n", "")
    assert read(unfinished)["kernels"][0]["operator"] == "merge"
    unfinished.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_is_stopped_at_once_says_so(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    result = command(*SMOKE, "--output", tmp_path / "new")
    assert result.exit_code == 130
    assert "Stopped; nothing was measured yet" in result.stdout
    assert not (tmp_path / "new").exists()


def test_a_model_that_takes_no_adapters_is_refused_before_anything_runs(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "warm_up", lambda _: pytest.fail("something ran"))
    result = command(*SMOKE, "--only", "model", "--models", "vit_tiny_patch16_224,resnet18", "--output", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: models: expected ones that take adapters, got resnet18: ")
    assert not list(tmp_path.iterdir())


def test_a_deadline_leaves_the_rest_out_and_says_so(command, tmp_path: Path) -> None:
    result = command(*SMOKE, "--only", "model,growth", "--deadline", "1", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "report.json").read_text())
    assert any(name.startswith("model") for name in made["left_out"]) or made["seconds"] < 3
    if made["left_out"]:
        assert "Left out for lack of time" in (tmp_path / "report.md").read_text()


def test_a_wrong_kernel_ends_with_an_error(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mosa_kernels.backends import cpu

    right = cpu.adapter_forward
    monkeypatch.setattr(cpu, "adapter_forward", lambda args: (right(args)[0] * 1.01, *right(args)[1:]))
    result = command(*SMOKE, "--only", "adapter_forward", "--output", tmp_path)
    assert result.exit_code == 1
    assert "wrong" in result.stdout
    rows = [r for each in json.loads((tmp_path / "report.json").read_text())["kernels"] for r in each["rows"]]
    assert {r["status"] for r in rows if r["provider"] == "cpu"} == {"red"}
    assert "error gate red" in (tmp_path / "report.md").read_text()


def test_compare_ends_with_an_error_where_something_became_slower(command, tmp_path: Path) -> None:
    paths = []
    for name, median in (("a", 1.0), ("b", 2.0)):
        paths.append(tmp_path / name / "report.json")
        write_json(paths[-1], report(record("adapter", [row("triton", median, True)])))
    slower = command("bench", "--compare", paths[0], paths[1].parent)
    assert slower.exit_code == 1
    assert "1 regression(s) beyond the noise" in slower.stdout
    assert "slower" in slower.stdout
    faster = command("bench", "--compare", paths[1], paths[0])
    assert faster.exit_code == 0
    assert "No regression" in faster.stdout


def test_tune_lists_what_it_would_run(command) -> None:
    result = command("bench", "--tune", "--dry-run", "--bottlenecks", "64", "--dtypes", "bf16")
    assert result.exit_code == 0, result.output
    assert "r 64, bf16" in result.stdout
    assert "Config(" in result.stdout


def test_choose_measures_a_table_that_is_used_and_shown(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path))
    words = ("--device", "cpu", "--shapes", "vit_ti", "--images", "1", "--bottlenecks", "8", "--dtypes", "fp32")
    try:
        result = command("bench", "--choose", *words, "--threads", "1", "--rounds", "3")
        assert result.exit_code == 0, result.output
        (file,) = (tmp_path / "choice").iterdir()
        made = json.loads(file.read_text())
        assert str(file) in result.stdout.replace("\n", "")
        assert made["complete"]
        assert {cell["operator"] for cell in made["cells"]} == {
            "adapter_forward", "adapter", "merge", "masked_adamw", "split",
        }  # fmt: skip
        for cell in made["cells"]:
            assert cell["ms"].keys() | cell["left_out"].keys() == {"reference", "cpu"}
            assert cell["backend"] == min(cell["ms"], key=cell["ms"].get)
            assert cell["operator"] in result.stdout
        weights = (torch.zeros(8, 192), None, torch.zeros(192, 8))
        call = AdapterArguments(torch.zeros(197, 192), None, *weights, *(None,) * 10)
        chosen = {cell["operator"]: cell["backend"] for cell in made["cells"]}
        assert choose_adapter_backend(call) == chosen["adapter_forward"]
        shown = json.loads(command("doctor", "--json").stdout)["choice"]["cpu"]
        assert shown["file"] == str(file)
        assert shown["made"] == made["made"]
        assert shown["operators"]["adapter"].startswith(f"{chosen['adapter']} in 1 of 1 measured calls")
        assert str(file) in command("doctor").stdout
    finally:
        measured.forget()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--preset", "fast"), "preset: expected one of smoke, quick, full"),
        (("--only", "adapters"), f"only: expected some of {', '.join(PARTS)}"),
        (("--device", "tpu"), "device: expected cpu or cuda, got 'tpu'"),
        (("--shapes", "vit_h"), "shapes: expected some of vit_ti"),
        (("--dtypes", "fp64"), "dtypes: expected some of fp32"),
        (("--bottlenecks", "0"), "bottlenecks: expected at least 1, got 0"),
        (("--expert-per", "token"), "expert-per: expected some of call, sample"),
        (("--only", ""), "only: expected at least one value, got ''"),
        (("--images", ","), "images: expected at least one value, got ','"),
        (("--only", "adapter", "--batch", "7"), "batch: expected with model, not with adapter alone"),
        (("--processor-time", "--threads", "2"), "threads: expected without --processor-time"),
        (("--bottlenecks", "8,x"), "bottlenecks: expected whole numbers with commas, got '8,x'"),
        (("--threads", "0"), "threads: expected at least 1, got 0"),
        (("--models", "vit_b"), "models: expected names of timm models, got 'vit_b'"),
        (("--dry-run",), "dry-run: expected together with --tune"),
        (("--choose", "--only", "merge"), "only: expected without --choose"),
        (("--choose", "--preset", "full"), "preset: expected without --choose"),
        (("--tune", "--dry-run", "--only", "merge", "--rounds", "5"), "only, rounds: expected without --tune"),
        (("--tune", "--dry-run", "--output", "out"), "output: expected without --tune"),
        (("--tune", "--choose"), "tune, choose: expected one of them, got both"),
        (("--choose", "--compare", "a", "b"), "choose, compare: expected one of them, got both"),
        (("--choose", "--device", "tpu"), "device: expected cpu or cuda, got 'tpu'"),
        (("--compare", "nowhere", "neither"), "got 'nowhere'"),
    ],
)
def test_wrong_input_is_named(command, words: tuple[str, ...], expected: str) -> None:
    result = command("bench", *words)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert expected in result.stderr


@pytest.mark.parametrize("words", [(), ("--choose",), ("--compare", "HEAD", "HEAD")])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    command, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file"
    reasons = {
        place: f"output: expected a folder, {place} is a file",
        place / "within": f"output {place / 'within'}: it cannot be made, for {place} is a file",
    }
    for output, reason in reasons.items():
        result = command("bench", "--preset", "smoke", *words, "--output", output)
        assert result.exit_code == 1
        assert result.stderr == f"error: {reason}\n"
        assert result.stdout == ""


def test_where_the_usual_output_cannot_be_written_nothing_is_measured(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    (tmp_path / "mosa-bench").touch()
    for words, place in (
        ((), "mosa-bench is a file"),
        (("--compare", "HEAD", "HEAD"), "mosa-bench is a file"),
        (("--choose",), f"it cannot be made, for {tmp_path / 'file'} is a file"),
    ):
        result = command("bench", *words)
        assert result.exit_code == 1
        assert place in result.stderr
        assert result.stdout == ""


def test_reports_take_no_options_of_a_measurement(command, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report())
    result = command("bench", "--compare", tmp_path, tmp_path, "--only", "adapter")
    assert result.exit_code == 1
    assert "compare: expected with --output alone" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_said(command, tmp_path: Path) -> None:
    result = command("bench", "--device", "cuda", "--output", tmp_path / "none")
    assert result.exit_code == 1
    assert "PyTorch sees no CUDA device" in result.stderr
    assert not (tmp_path / "none").exists()
    assert command("bench", "--tune").exit_code == 1


def test_a_report_that_is_not_there_is_said(command, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report())
    for names in ((tmp_path, tmp_path / "absent"), ("HEAD", tmp_path)):
        result = command("bench", "--compare", *names)
        assert result.exit_code == 1
        (absent,) = (name for name in names if name != tmp_path)
        assert f"compare: expected two reports or two commits, got the report {tmp_path} and {absent}" in result.stderr
