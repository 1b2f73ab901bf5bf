"""Reports of two commits of a clone: each is checked out beside it, built and measured by its own benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mosa_kernels._extension import BUILD_RECORD
from mosa_kernels.bench.records import Record, failures, has_failed, timings
from mosa_kernels.bench.run import JSON, Say, read
from mosa_kernels.train.folder import read_json

ORDER = (0, 1, 1, 0)  # a drift of the machine hits both alike


def resolve(name: str, clone: Path) -> str:
    """The full id of a commit.

    Raises:
        ValueError: there is none of this name, or no clone.
    """
    done = _git(clone, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if done.returncode != 0:
        raise ValueError(
            f"compare: expected a report.json, a folder with one, or a commit of the clone at {clone}, got {name!r}"
        )
    return done.stdout.strip()


def measure_commits(names: Sequence[str], arguments: Sequence[str], clone: Path, say: Say) -> list[Record]:
    """One report for each of two commits, measured in turn and the faster of its two runs kept row by row.

    Args:
        names: of the commits.
        arguments: of `mosa-kernels bench`, for both.
        clone: the repository.

    Raises:
        ValueError: a name is no commit, or a commit does not build, has no such command or dies of it.
    """
    commits = [resolve(name, clone) for name in names]
    if _git(clone, "status", "--porcelain", "--untracked-files=no").stdout:
        say("note: what is not committed is measured in neither")
    with tempfile.TemporaryDirectory(prefix="mosa-bench-") as scratch:
        folder = Path(scratch)
        with (
            _checked_out(commits[0], folder / "0", clone) as first,
            _checked_out(commits[1], folder / "1", clone) as second,
        ):
            trees = (first, second)
            for name, tree in zip(names, trees, strict=True):
                say(f"building {name}")
                _build(tree, name)
            _compare_builds(names, [_left_out(tree) for tree in trees], say)
            reports: list[list[Record]] = [[], []]
            for number in ORDER:
                say(f"measuring {names[number]}")
                output = folder / f"report-{len(reports[0]) + len(reports[1])}"
                reports[number].append(_measure(trees[number], names[number], arguments, output))
    return [faster(*pair) for pair in reports]


def faster(first: Record, second: Record) -> Record:
    """The first report with the rows of the second where those are faster, or wrong: once is enough.

    A row keeps the medians of both runs, which say how far a run is off.
    """
    others = dict(timings(second))
    for name, row in timings(first):
        other = others.get(name, {})
        if "ms" in row and "ms" in other:
            row["medians"] = [row["ms"]["median"], other["ms"]["median"]]
            row["ms"] = min(row["ms"], other["ms"], key=lambda ms: ms["median"])
        elif "ms" in row and has_failed(other):
            del row["ms"]
            row |= {"status": other["status"], "reason": other["reason"]}
    first["broken"] = list(dict.fromkeys([*first.get("broken", []), *second.get("broken", [])]))
    return first


@contextmanager
def _checked_out(commit: str, folder: Path, clone: Path) -> Iterator[Path]:
    try:
        done = _git(clone, "worktree", "add", "--detach", "--quiet", folder, commit)
        _require_success(done, f"checking out {commit}")
        yield folder
    finally:
        _git(clone, "worktree", "remove", "--force", "--force", folder)  # twice: one that is half made is locked


def _build(tree: Path, name: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    _require_success(subprocess.run(command, cwd=tree, capture_output=True, text=True), f"building {name}")


def _left_out(tree: Path) -> dict[str, str]:
    """Which kernels the build left out, by kind, and why."""
    record = tree / "mosa_kernels" / BUILD_RECORD.name
    reasons: dict[str, str | None] = read_json(record) if record.is_file() else {}
    return {kind: reason for kind, reason in reasons.items() if reason is not None}


def _compare_builds(names: Sequence[str], left_out: Sequence[Mapping[str, str]], say: Say) -> None:
    """Raises a ValueError where one commit has kernels that were not built for the other."""
    for name, here, there in zip(names, left_out, reversed(left_out), strict=True):
        for kind in here.keys() - there.keys():
            raise ValueError(f"compare: building {name} left out its {kind} kernels: {here[kind]}")
    for kind, reason in left_out[0].items():
        say(f"note: both are measured without their {kind} kernels: {reason}")


def _measure(tree: Path, name: str, arguments: Sequence[str], output: Path) -> Record:
    code = "from mosa_kernels.cli.main import app; app()"
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, "bench", *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    report = read(output) if (output / JSON).is_file() else None
    wrong = done.returncode == 1 and report is not None and failures(report)  # it says so, and so does the comparison
    if report is None or not (wrong or done.returncode == 0):
        raise ValueError(f"compare: measuring {name} ended with exit status {done.returncode}: {_last_words(done)}")
    module = json.loads(
        subprocess.run(
            [sys.executable, "-c", "import json, mosa_kernels; print(json.dumps(mosa_kernels.__file__))"],
            cwd=tree, env=environment, capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    if not Path(module).is_relative_to(tree):
        raise ValueError(f"compare: expected {name}'s own package, Python imports {module}")
    return report


def _git(clone: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True)


def _require_success(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode != 0:
        raise ValueError(f"compare: {what} failed: {_last_words(done)}")


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a command wrote, without the box that typer draws around its errors."""
    lines = (line.strip(" │╭╮╰╯─") for line in (done.stderr or done.stdout).splitlines())
    return next(reversed([line for line in lines if line]), "no output")
