"""Two commits: each runs its own package from a checkout of its own, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from reports import record, report, row

from mosa_kernels.bench.commits import measure_commits, resolve
from mosa_kernels.bench.compare import broken, compare, markdown

PROGRAM = """
import os, pathlib, shutil, sys
def app():
    out = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
    out.mkdir(parents=True)
    here = pathlib.Path(__file__).parents[2]
    (here / "built").stat()
    shutil.copy(here / "made.json", out / "report.json")
    if (here / "status").is_file():
        print("Segmentation fault", file=sys.stderr, flush=True)
        os._exit(int((here / "status").read_text()))
"""


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of something that builds and reports like this package: triton takes 1 ms, then 2 ms, then breaks."""
    folder = tmp_path / "clone"
    (folder / "mosa_kernels" / "cli").mkdir(parents=True)
    for name in ("__init__.py", "cli/__init__.py"):
        (folder / "mosa_kernels" / name).touch()
    (folder / "mosa_kernels" / "cli" / "main.py").write_text(PROGRAM)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name, median in (("one", 1.0), ("two", 2.0)):
        (folder / "made.json").write_text(json.dumps(report(record("adapter", [row("triton", median, True)]))))
        (folder / "setup.py").write_text("open('built', 'w').close()")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", name)
        git(folder, "tag", name)
    for name, status in (("dies", 139), ("wrong", 1)):
        made = report(record("adapter", [row("triton", 1.0, True)]))
        made["broken"] = ["adapter: no memory"] if name == "wrong" else []
        (folder / "made.json").write_text(json.dumps(made))
        (folder / "status").write_text(str(status))
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", name)
        git(folder, "tag", name)
    (folder / "setup.py").write_text("raise SystemExit('no compiler')")
    git(folder, "commit", "--quiet", "--all", "--message", "three")
    return folder


def test_two_commits_are_built_and_measured_in_turn(clone: Path) -> None:
    said: list[str] = []
    reports = measure_commits(("one", "two"), ["--preset", "smoke"], clone, said.append)
    assert [r["kernels"][0]["rows"][0]["ms"]["median"] for r in reports] == [1.0, 2.0]
    assert said[2:] == ["measuring one", "measuring two", "measuring two", "measuring one"]
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    assert git(clone, "status", "--porcelain") == ""


def test_what_goes_wrong_is_said(clone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compare: building main failed: no compiler"):
        measure_commits(("one", "main"), [], clone, lambda line: None)
    assert len(git(clone, "worktree", "list").splitlines()) == 1
    for folder in (clone, tmp_path):
        with pytest.raises(
            ValueError, match=r"expected a report.json, a folder with one, or a commit .* got 'nowhere'"
        ):
            resolve("nowhere", folder)
    assert resolve("one", clone) == git(clone, "rev-parse", "one")


def test_a_commit_whose_process_dies_is_no_measurement(clone: Path) -> None:
    with pytest.raises(ValueError, match="measuring dies ended with exit status 139: Segmentation fault"):
        measure_commits(("one", "dies"), [], clone, lambda line: None)
    assert len(git(clone, "worktree", "list").splitlines()) == 1


def test_what_a_commit_says_is_broken_is_kept(clone: Path) -> None:
    reports = measure_commits(("one", "wrong"), [], clone, lambda line: None)
    assert broken(*reports) == ["adapter: no memory"]
    assert "1 case(s) broke:\n\n- adapter: no memory" in markdown(*reports, ("one", "wrong"), compare(*reports))
