"""Reports of two commits of a clone: each is checked out beside it, built and measured by its own benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mosa_kernels.bench.records import Record, failures, has_failed, timings
from mosa_kernels.bench.run import JSON, Say, read

ORDER = (0, 1, 1, 0)  # a drift of the machine hits both alike


def resolve(name: str, clone: Path) -> str:
    """The full id of a commit.

    Raises:
        ValueError: there is none of this name, or no clone.
    """
    done = subprocess.run(
        ["git", "-C", clone, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], capture_output=True, text=True
    )
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
    _run(["git", "-C", clone, "worktree", "add", "--detach", "--quiet", folder, commit], f"checking out {commit}")
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", clone, "worktree", "remove", "--force", folder], capture_output=True)


def _build(tree: Path, name: str) -> None:
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], f"building {name}", cwd=tree)


def _measure(tree: Path, name: str, arguments: Sequence[str], output: Path) -> Record:
    code = "from mosa_kernels.cli.main import app; app()"
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, "bench", *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    report = read(output) if (output / JSON).is_file() else None
    wrong = done.returncode == 1 and report is not None and failures(report)  # it says so, and so does the comparison
    if report is None or not (wrong or done.returncode == 0):
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"compare: measuring {name} ended with exit status {done.returncode}: {last[0]}")
    module = json.loads(
        subprocess.run(
            [sys.executable, "-c", "import json, mosa_kernels; print(json.dumps(mosa_kernels.__file__))"],
            cwd=tree, env=environment, capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    if not Path(module).is_relative_to(tree):
        raise ValueError(f"compare: expected {name}'s own package, Python imports {module}")
    return report


def _run(command: Sequence[str | Path], what: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise ValueError(f"compare: {what} failed: {last[0]}")
