"""Two reports side by side: a regression is what lies beyond the noise, or is gone."""

from __future__ import annotations

import pytest
from reports import ms, record, report, row

from mosa_kernels.bench.commits import faster
from mosa_kernels.bench.compare import caveats, compare, markdown, regressions, same_device


def pair(before: float | None, after: float | None) -> list:
    old, new = (report(record("adapter", [row("triton", value, True)])) for value in (before, after))
    return compare(old, new)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [(1.0, 1.2, "slower"), (1.2, 1.0, "faster"), (1.0, 1.04, "same"), (1.0, None, "lost"), (None, 1.0, "new")],
)
def test_verdicts(before: float | None, after: float | None, verdict: str) -> None:
    (difference,) = pair(before, after)
    assert difference.verdict == verdict
    assert bool(regressions([difference])) == (verdict in ("slower", "lost"))


def test_a_large_change_within_the_spread_is_noise() -> None:
    noisy = [report(record("adapter", [row("triton", 1.0, True)])) for _ in range(2)]
    noisy[0]["kernels"][0]["rows"][0]["ms"] = ms(1.0, 0.3)
    noisy[1]["kernels"][0]["rows"][0]["ms"] = ms(1.2, 0.3)
    assert [d.verdict for d in compare(*noisy)] == ["same"]


def test_what_turned_red_is_a_regression_and_what_was_not_asked_for_is_none() -> None:
    before = report(record("adapter", [row("triton", 1.0, True)]), record("merge", [row("cuda", 1.0, True)]))
    red = {"provider": "triton", "ours": True, "status": "red", "reason": "error gate red: x"}
    after = report(record("adapter", [red]))
    found = {d.name[2]: d for d in compare(before, after)}
    assert found["triton"].verdict == "lost"
    assert found["cuda"].verdict == "absent"
    assert [d.name[2] for d in regressions(list(found.values()))] == ["triton"]
    text = markdown(before, after, ("a", "b"), list(found.values()))
    assert "1 regression(s)" in text
    assert "lost: error gate red: x" in text


@pytest.mark.parametrize("status", ["red", "failed"])
def test_what_came_in_wrong_is_a_regression_though_it_never_had_a_time(status: str) -> None:
    wrong = {"provider": "triton", "ours": True, "status": status, "reason": "error gate red: x"}
    right = row("cpu", 1.0, True)
    after = report(record("adapter", [right, wrong]))
    for before in (report(record("adapter", [right])), report(record("adapter", [right, row("triton", None, True)]))):
        found = compare(before, after)
        assert [(d.name[2], d.verdict) for d in regressions(found)] == [("triton", "wrong")]
        text = markdown(before, after, ("a", "b"), found)
        assert "1 regression(s)" in text
        assert "| triton | - | - | - | wrong: error gate red: x |" in text
    assert regressions(compare(after, after)) == []  # it is as it was
    theirs = report(record("adapter", [right, {**wrong, "ours": False}]))
    assert regressions(compare(report(record("adapter", [right])), theirs)) == []


def test_a_slower_baseline_is_no_regression_of_ours_but_said() -> None:
    before, after = (report(record("adapter", [row("eager", value)])) for value in (1.0, 2.0))
    differences = compare(before, after)
    assert [d.verdict for d in differences] == ["slower"]
    assert regressions(differences) == []
    assert "1 of what is not ours became slower too" in markdown(before, after, ("a", "b"), differences)


def runs(*pairs: tuple[float, float]) -> list:
    """A report for each (eager, ours)."""
    return [report(record("adapter", [row("eager", eager), row("cpu", ours, True)])) for eager, ours in pairs]


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((10.0, 1.0), (10.0, 1.2), "slower"),
        ((10.0, 1.0), (30.0, 3.1), "undecided"),  # the whole machine
        ((10.0, 1.0), (12.0, 1.3), "undecided"),  # a little more than the machine, which moved as much
        ((10.0, 1.0), (12.0, 3.0), "slower"),  # far more than the machine
        ((30.0, 3.1), (10.0, 1.0), "undecided"),
        ((10.0, 1.2), (10.0, 1.0), "faster"),
        ((10.0, 1.0), (25.0, 1.0), "same"),  # eager alone, whose allocator had to ask the system
        ((25.0, 1.0), (10.0, 1.0), "same"),
    ],
)
def test_what_is_not_ours_says_what_the_machine_did(
    before: tuple[float, float], after: tuple[float, float], verdict: str
) -> None:
    reports = runs(before, after)
    differences = compare(*reports)
    found = {d.name[2]: d.verdict for d in differences}
    assert found["cpu"] == verdict
    assert bool(regressions(differences)) is (verdict == "slower")
    assert ("1 undecided" in markdown(*reports, ("a", "b"), differences)) is (verdict == "undecided")


def test_on_a_busy_machine_nothing_is_decided() -> None:
    before, after = runs((10.0, 1.0), (10.0, 2.0))
    assert [d.name[2] for d in regressions(compare(before, after))] == ["cpu"]
    for spoiled in (0, 1):  # eager, which says what the machine does, or ours alone
        after = runs((10.0, 2.0))[0]
        times = after["kernels"][0]["rows"][spoiled]
        times["ms"] = ms(times["ms"]["median"], 0.25)
        differences = compare(before, after)
        assert {d.name[2]: d.verdict for d in differences}["cpu"] == "undecided"
        assert regressions(differences) == []
        text = markdown(before, after, ("a", "b"), differences)
        assert ("the machine had other work during the second report" in text) is (spoiled == 0)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((0.191, 0.4), (0.593, 0.39), "same"),  # the runs overlap
        ((0.4, 0.19), (0.6, 0.45), "same"),  # they do not, but differ as much among themselves
        ((1.0, 1.02), (1.5, 1.4), "slower"),
        ((1.5, 1.4), (1.0, 1.02), "faster"),
    ],
)
def test_of_commits_every_run_has_to_be_slower(
    before: tuple[float, float], after: tuple[float, float], verdict: str
) -> None:
    sides = [faster(*runs(*((10.0, ours) for ours in side))) for side in (before, after)]
    assert {d.name[2]: d.verdict for d in compare(*sides)}["cpu"] == verdict


def test_other_versions_presets_and_clocks_are_said() -> None:
    before = report(record("adapter", [row("triton", 1.0, True)]))
    machine = {"versions": {"torch": "2.12.0"}, "compiled_cpu_kernels": "avx512", "compiled_cuda_kernels": None}
    machine["gpu"] = {"driver": "1.3", "sm_clock": "900 MHz", "memory_clock": "1300 MHz"}
    after = report(record("merge", [row("triton", 1.0, True)]), **machine)
    after |= {"preset": "full", "request": {"processor_time": True}, "complete": False}
    before["machine"]["gpu"] |= {"sm_clock": "1800 MHz", "memory_clock": "1310 MHz"}
    text = markdown(before, after, ("a", "b"), compare(before, after))
    for words in (
        "torch differs: 2.11.0 and 2.12.0", "preset differs: quick and full", "processor-time differs: None and True",
        "compiled for the CPU differs: avx2 and avx512", "compiled for CUDA differs: 90-real and None",
        "driver differs: 1.2 and 1.3", "the clock differs: 1800 MHz and 900 MHz", "the second report was ended",
        "no case in common",
    ):  # fmt: skip
        assert words in text, words
    assert "memory clock" not in text
    assert caveats(before, before) == []


def test_of_other_devices_nothing_is_called_a_regression() -> None:
    before = report(record("adapter", [row("triton", 1.0, True)]))
    after = report(record("adapter", [row("triton", 2.0, True)]), device="NVIDIA A100")
    assert not same_device(before, after)
    text = markdown(before, after, ("a", "b"), compare(before, after))
    assert "the device differs: NVIDIA H200 and NVIDIA A100" in text
    assert "not comparable" in text
    assert "| 1 | 2 | 2 |  |" in text
    assert "egression" not in text
    assert "slower" not in text


def test_what_is_wrong_in_one_of_two_runs_is_wrong() -> None:
    red = {"provider": "triton", "ours": True, "status": "red", "reason": "error gate red: x"}
    rows = ([row("triton", 1.0, True)], [red])
    for order in (rows, rows[::-1]):
        (found,) = faster(*(report(record("adapter", list(each))) for each in order))["kernels"][0]["rows"]
        assert "ms" not in found
        assert found["status"] == "red"


def test_of_two_runs_the_faster_counts_row_by_row() -> None:
    rows = ([row("eager", 2.0), row("triton", 1.0, True)], [row("eager", 1.0), row("triton", 2.0, True)])
    best = faster(*(report(record("adapter", each)) for each in rows))
    assert [r["ms"]["median"] for r in best["kernels"][0]["rows"]] == [1.0, 1.0]
