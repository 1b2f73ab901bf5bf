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


def test_a_checkout_that_fails_halfway_is_taken_back(clone: Path) -> None:
    hook = clone / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'no such filter' >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(ValueError, match=r"compare: checking out .* failed: no such filter"):
        measure_commits(("one", "two"), [], clone, lambda line: None)
    assert len(git(clone, "worktree", "list").splitlines()) == 1


def test_what_is_not_committed_is_said_to_be_left_out(clone: Path) -> None:
    (clone / "setup.py").write_text("raise SystemExit('not committed')")
    said: list[str] = []
    measure_commits(("one", "two"), [], clone, said.append)
    assert said[0] == "note: what is not committed is measured in neither"
    assert (clone / "setup.py").read_text() == "raise SystemExit('not committed')"


def test_a_commit_that_builds_without_its_kernels_is_not_measured(clone: Path) -> None:
    record = {"native": "the build failed; see its output", "cuda": None}
    write = f"open('built', 'w').close(); open('mosa_kernels/_build.json', 'w').write({json.dumps(record)!r})"
    git(clone, "checkout", "--quiet", "-b", "less", "two")
    (clone / "setup.py").write_text(write)
    git(clone, "commit", "--quiet", "--all", "--message", "less")
    for names in (("one", "less"), ("less", "one")):
        with pytest.raises(ValueError, match="compare: building less left out its native kernels: the build failed"):
            measure_commits(names, [], clone, lambda line: None)
    said: list[str] = []
    measure_commits(("less", "less"), [], clone, said.append)
    assert "note: both are measured without their native kernels: the build failed; see its output" in said


def test_an_option_that_a_commit_does_not_know_is_named(clone: Path) -> None:
    program = "import typer\napp = typer.Typer()\n@app.command()\ndef bench(output: str): ...\n"
    (clone / "mosa_kernels" / "cli" / "main.py").write_text(program)
    (clone / "setup.py").write_text("")
    git(clone, "commit", "--quiet", "--all", "--message", "old")
    with pytest.raises(ValueError, match="measuring HEAD ended with exit status 2: No such option: --rounds"):
        measure_commits(("HEAD", "one"), ["--rounds", "3"], clone, lambda line: None)
