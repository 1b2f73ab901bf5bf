"""What a report says: tables, losses, goals, and nothing where nothing was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reports import ms, record, report, row

from mosa_kernels.bench.goals import NOT_MEASURED, answers
from mosa_kernels.bench.limits import known_roofline
from mosa_kernels.bench.plots import draw
from mosa_kernels.bench.records import failures, losses, name_of, timings
from mosa_kernels.bench.report import HOW_TO_SEND, limits_line, markdown
from mosa_kernels.bench.run import read, write
from mosa_kernels.train.folder import write_json

FAST = {"copy_share": 0.85, "launches": 1, "saved_bytes": 128 * 197 * 8, "host_us": {"host": 12.0, "wall": 50.0}}


def gpu_report() -> dict:
    rows = [
        row("eager", 0.4, host_us={"host": 60.0, "wall": 70.0}),
        row("compile", 0.2),
        row("compile max-autotune", 0.15),
        row("triton", 0.1, True, **FAST),
        row("cuda", None, True),
    ]
    one_image = "vit_b, 1 x 197"
    return report(
        record("adapter_forward", rows),
        record("adapter", rows, shape="vit_l, 128 x 197"),
        record("adapter", rows, shape=one_image),
        record("adapter_forward", rows, shape=one_image),
        record("masked_adamw", [row("triton", 1.0, True, launches=3)]),
    )


def test_goals_are_met_missed_or_not_measured() -> None:
    found = {(a.case.split(",")[0], a.backend, a.goal.name): a for a in answers(gpu_report())}
    forward = {
        name: a
        for (operator, backend, name), a in found.items()
        if (operator, backend) == ("adapter_forward", "triton")
    }
    assert forward["times as fast as eager"].value == pytest.approx(4)
    assert forward["times as fast as eager"].verdict == "met"
    assert forward["times as fast as compile max-autotune"].verdict == "missed"
    assert forward["share of the measured copy bandwidth on 3A"].shown == "0.85"
    assert forward["host time a call"].verdict == "met"
    assert found["adapter", "triton", "saved bytes a token"].value == 8
    assert found["adapter", "triton", "times as fast as eager, end to end in a row of calls"].value == pytest.approx(
        1.4
    )
    assert found["masked_adamw", "triton", "launches"].verdict == "missed"
    assert {a.verdict for (_, backend, _), a in found.items() if backend == "cuda"} == {NOT_MEASURED}


def test_goals_of_a_cpu_are_others() -> None:
    rows = [row("eager", 10.0), row("cpu", 4.0, True)]
    made = report(record("adapter_forward", rows, shape="vit_b, 64 x 197", dtype="fp32"), device="a CPU")
    (answer,) = answers(made)
    assert (answer.backend, answer.shown, answer.verdict) == ("cpu", "2.50x", "met")
    assert "*Lowest*" not in markdown(made)


def test_of_rows_of_the_same_call_the_lowest_ratio_counts() -> None:
    case = {"shape": "vit_b, 64 x 197", "dtype": "fp32"}
    again = [row("eager", 10.0), row("cpu, element", 5.5, True), row("cpu, column", 1.0, True)]
    both = [row("eager", 1.0), row("cpu, element", 5.0, True)]
    made = report(
        record("adapter_forward", [row("eager", 10.0), row("cpu", 4.0, True)], **case),
        record("granularity", again, **case, **{"pass": "forward"}),
        record("granularity", both, **case, **{"pass": "forward + backward"}),
        device="a CPU",
    )  # fmt: skip
    (answer,) = answers(made)
    assert (answer.shown, answer.verdict) == ("1.82x, lowest of 2", "missed")
    assert "*Lowest*: this report times such a call more than once" in markdown(made)


def test_losses_are_named_and_other_functions_do_not_count() -> None:
    lost = record("adapter", [row("eager", 1.0), row("cpu", 2.0, True), row("triton", 1.5, True)])
    close = record("adapter", [row("eager", 1.0), row("cpu", 1.01, True)])
    won = record("adapter", [row("eager", 2.0), row("cpu", 1.0, True), row("merged dense", 0.5)])
    assert losses(report(won)) == []
    (line,) = losses(report(lost))
    assert "eager is 1.50 times as fast as triton" in line
    assert "within the spread" in losses(report(close))[0]


def model_report() -> dict:
    def variants(*times: tuple[str, float, bool]) -> list[dict]:
        rows = [row("", median, ours, images_per_second=1.0, peak_bytes=3 << 20) for _, median, ours in times]
        return [
            {key: value for key, value in each.items() if key != "provider"} | {"variant": name}
            for each, (name, *_) in zip(rows, times, strict=True)
        ]

    training = variants(
        ("backbone alone", 1.0, False), ("MoSA cpu, expert per sample", 4.0, True),
        ("MoSA cpu, expert per batch", 2.0, True), ("MoSA eager, expert per sample", 3.0, False),
        ("MoSA N copies, expert per batch", 3.0, False), ("AdaptFormer cpu", 9.0, True),
    )  # fmt: skip
    inference = variants(("no adapters", 1.0, False), ("unmerged, cpu", 2.0, True), ("unmerged, eager", 1.5, False))
    return {**report(), "models": [{"case": {"model": "vit"}, "training": training, "inference": inference}]}


def test_losses_of_models_and_the_optimizer_are_named() -> None:
    step = record("masked_adamw", [row("cpu", 2.0, True), row("AdamW (dense, all entries)", 1.0)])
    (line,) = losses(report(step))
    assert "AdamW (dense, all entries) is 2.00 times as fast as cpu" in line
    assert losses(model_report()) == [
        "model, training, vit: MoSA eager, expert per sample is 1.33 times as fast as MoSA cpu, expert per sample",
        "model, inference, vit: unmerged, eager is 1.33 times as fast as unmerged, cpu",
    ]
    text = markdown(model_report())
    assert "## Where the fused backends lose" in text
    assert "| inference | ms | images/s | peak |" in text


def test_growth_marks_what_is_lost_and_counts_what_training_keeps() -> None:
    rows = [
        row("eager", 1.0, state_bytes=1 << 20), row("N copies", 3.0, state_bytes=4 << 20),
        row("cpu", 2.0, True, state_bytes=1 << 20),
    ]  # fmt: skip
    growing = {**record("adapter", rows), "axis": "experts N", "value": 4}
    text = markdown({**report(), "growth": [growing]})
    assert "| experts N | eager, ms | N copies, ms | cpu, ms | eager, trained state | N copies, trained state |" in text
    assert "| 4 | 1 | 3 | **2** | 1 MiB | 4 MiB |" in text
    for each in rows:
        del each["state_bytes"]  # as in a report of before
    assert "| 4 | 1 | 3 | **2** |" in markdown({**report(), "growth": [{**growing, "rows": rows}]})


def test_growth_is_headed_by_what_does_not_grow() -> None:
    rows = [row("eager", 1.0), row("cpu", 2.0, True)]
    growing = [
        {**record("adapter", rows, **case), "axis": axis, "value": 1}
        for axis, case in (
            ("tokens", {"shape": "vit_s, 1 x 197"}),
            ("bottleneck r", {"r": 8}),
            ("adapters", {"layers": 2}),
        )
    ]
    text = markdown({**report(), "growth": growing})
    assert "Against tokens: vit_s, d 768, r 64, N 4, bf16, expert per call\n" in text
    assert "Against bottleneck r: vit_b, 128 x 197, d 768, N 4, bf16, expert per call\n" in text
    assert "Against adapters: vit_b, 128 x 197, d 768, r 64, N 4, bf16, expert per call\n" in text


def test_the_fastest_of_a_case_is_bold_and_what_computes_less_is_not() -> None:
    text = markdown(report(record("adapter", [row("eager", 2.0), row("cpu", 3.0, True), row("merged dense", 1.0)])))
    assert "| eager | **2** (1.96 to 2.04) |" in text
    assert "| cpu | 3 (2.94 to 3.06) |" in text
    assert "| merged dense | 1 (" in text


def test_a_disturbed_case_is_said() -> None:
    calm, busy = [row("eager", 2.0), row("cpu", 1.0, True)], [row("eager", 2.0), row("cpu", 1.0, True)]
    busy[0]["ms"] = ms(2.0, 0.3)
    made = report(record("adapter", calm), record("merge", busy))
    assert "1 of 2 cases were disturbed" in markdown(made)
    assert markdown(made).count("Disturbed: eager.") == 1
    made["growth"] = [{**record("adapter", busy), "axis": "tokens", "value": 197}]
    assert "Disturbed: 197 (eager)." in markdown(made)
    assert "isturbed" not in markdown(report(record("adapter", calm)))


def test_bytes_and_products_have_columns() -> None:
    rows = [row("eager", 1.0, bytes=3 << 20, copy_share=0.5, matrix_share=0.25)]
    assert "| provider | ms | x eager | bytes | copy | products | error (eager) |" in markdown(
        report(record("adapter", rows))
    )


def test_an_allocator_other_than_usual_is_said() -> None:
    assert "allocator, for all providers alike: kept" in markdown(report(allocator="kept"))
    assert "allocator" not in markdown(report())


def test_markdown_says_everything_once() -> None:
    made = gpu_report()
    made["kernels"].append(record("adapter", [row("eager", 1.0), row("triton", 2.0, True)], dtype="fp16"))
    made["left_out"] = ["model: vit_l"]
    text = markdown(made, ["kernels.png"])
    for words in (
        "# NVIDIA H200", "commit abc", "driver 1.2", "copying 4000 GB/s", "![kernels](kernels.png)", "| met |",
        "| missed |", NOT_MEASURED, "**0.1** (0.098 to 0.102)", "eager is 2.00 times as fast as triton",
        "Not available: cuda (not here).", "model: vit_l", HOW_TO_SEND,
    ):  # fmt: skip
        assert words in text, words
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_makers_figures_stand_where_they_are_known() -> None:
    made = gpu_report()
    for name, words in (
        (
            "NVIDIA H200",
            "The maker's: 4800 GB/s, 989 TFLOP/s in 16 bits (NVIDIA H200 datasheet, SXM); copying reaches 83%",
        ),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "The maker's: 576 GB/s (256 bits of GDDR6 at 18 Gbit/s); copying"),
    ):
        known = known_roofline(name)
        assert known is not None
        made["limits"]["known"] = known._asdict()
        assert words in limits_line(made)


def test_a_report_is_written_and_read_back(tmp_path: Path) -> None:
    made = gpu_report()
    paths = write(made, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["report.json", "report.md", "kernels.png"]
    assert read(tmp_path / "new" / "folder") == json.loads(paths[0].read_text()) == made
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert not list(paths[0].parent.glob(".*"))


def test_pictures_that_a_later_report_does_not_have_go_and_other_files_stay(tmp_path: Path) -> None:
    for name in ("models.png", "growth.png", "mine.png", "report.unfinished.json"):
        (tmp_path / name).touch()
    write(gpu_report(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.json", "report.md", "kernels.png", "mine.png"}


def test_a_folder_without_a_finished_report_has_the_unfinished_one(tmp_path: Path) -> None:
    unfinished = gpu_report() | {"complete": False}
    write_json(tmp_path / "report.unfinished.json", unfinished)
    assert read(tmp_path) == unfinished
    write_json(tmp_path / "report.json", gpu_report())
    assert "complete" not in read(tmp_path)


def test_without_matplotlib_the_pictures_alone_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    paths = write(gpu_report(), tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md"]
    assert "Pictures were left out: " in paths[1].read_text()
    assert "![" not in paths[1].read_text()


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="expected a report of format 1, got 99"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("spoil", "missing"),
    [
        (lambda made: made.update(machine={}), "machine.device"),
        (lambda made: made.pop("machine"), "machine"),
        (lambda made: made.update(kernels=[7]), r"kernels\[0\]"),
        (lambda made: made["kernels"][1].pop("rows"), r"kernels\[1\].rows"),
        (lambda made: made["kernels"][0]["rows"][3].pop("ours"), r"kernels\[0\].rows\[3\].ours"),
        (lambda made: made["kernels"][0]["rows"][0]["ms"].pop("p80"), r"kernels\[0\].rows\[0\].ms.p80"),
        (lambda made: made.update(growth=made["kernels"][:1]), r"growth\[0\].axis"),
    ],
)
def test_a_report_that_lacks_something_is_refused_with_its_name(
    spoil: Callable[[dict], object], missing: str, tmp_path: Path
) -> None:
    made = gpu_report()
    spoil(made)
    (tmp_path / "report.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=rf"report.json: expected a report with {missing}, got none"):
        read(tmp_path)


def test_pictures_of_nothing_are_not_drawn(tmp_path: Path) -> None:
    assert draw(report(), tmp_path) == []


def test_names_and_timings() -> None:
    made = gpu_report()
    made["growth"] = [{**made["kernels"][0], "axis": "tokens", "value": 5}]
    training = [
        {"variant": "MoSA triton, expert per sample", "ours": True, "status": "red", "reason": "error gate red"}
    ]
    made["models"] = [{"case": {"model": "vit", "batch": 2}, "training": training, "inference": []}]
    names = [name for name, _ in timings(made)]
    assert len(names) == len(set(names))
    assert ("growth with tokens", name_of(made["kernels"][0]["case"]), "eager") in names
    assert name_of(made["kernels"][0]["case"]) == "vit_b, 128 x 197, d 768, r 64, N 4, bf16, expert per call"
    assert failures(made) == ["model, training, vit, batch 2, MoSA triton, expert per sample: error gate red"]
