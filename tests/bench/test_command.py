"""The command's own part: two reports on the command line, and what it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
from reports import record, report, row
from typer.testing import CliRunner, Result

from mosa_kernels.cli.main import app
from mosa_kernels.train.folder import write_json


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Reports: of a device, of another, and of the first with a case that broke."""
    fine = report(record("adapter", [row("triton", 1.0, True)]))
    other = report(record("adapter", [row("triton", 1.0, True)]), device="NVIDIA A100-SXM4-80GB")
    broken = {**fine, "broken": ["merge: no memory"]}
    found = [tmp_path / f"{name}.json" for name in ("fine", "other", "broken")]
    for path, made in zip(found, (fine, other, broken), strict=True):
        write_json(path, made)
    return found


def test_other_devices_and_what_broke_end_with_an_error(paths: list[Path]) -> None:
    fine, other, broken = paths
    assert bench("--compare", fine, fine).exit_code == 0
    result = bench("--compare", fine, other)
    assert result.exit_code == 1
    assert "not comparable" in result.stdout
    result = bench("--compare", fine, broken)
    assert result.exit_code == 1
    assert "1 case(s) broke" in result.stdout
    assert bench("--compare", broken, fine).exit_code == 0


def test_the_comparison_of_two_reports_is_written_where_asked_for(paths: list[Path], tmp_path: Path) -> None:
    assert bench("--compare", paths[0], paths[0], "--output", tmp_path / "out").exit_code == 0
    assert "No regression" in (tmp_path / "out" / "compare.md").read_text()


def test_a_wish_that_leaves_nothing_to_run_is_told_so(tmp_path: Path) -> None:
    smoke = ("--preset", "smoke", "--device", "cpu", "--output", tmp_path)
    result = bench(*smoke, "--only", "merge", "--providers", "merged dense")
    assert result.exit_code == 1
    assert "nothing was measured; merged dense: this part has no such provider" in result.stderr
    result = bench(*smoke, "--only", "merge", "--providers", "merged dense,eager")
    assert result.exit_code == 0
    assert "Not available: merged dense (this part has no such provider)." in (tmp_path / "report.md").read_text()
