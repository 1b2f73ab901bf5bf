"""What the phases of gpu.sh came to: summary.md, and the logs, phases.json and further reports in one archive.

python benchmarks/gpu_summary.py OUT

Exits with 1 where a phase did not pass.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from mosa_kernels.backends.measured import Table
from mosa_kernels.bench.goals import answers
from mosa_kernels.bench.records import name_of
from mosa_kernels.bench.report import goals_section, kernel_section, table
from mosa_kernels.bench.run import MARKDOWN, UNFINISHED, find, read, write
from mosa_kernels.train.folder import write_json, write_text

_ENDED = {0: "passed", 5: "no tests", 9: "errors found", 124: "out of time", 137: "out of time"}
_PASSED = ("passed", "no tests")
_MAY_FAIL = ("dram_bytes",)  # a profiler that is not there, or not allowed to read the counters
_FURTHER = {
    "granularity": "What experts own: random entries, blocks, rows or whole units (columns)",
    "one_launch": "The CUDA backward pass in one launch, by thread-block clusters",
    "triton_three_launches": "Triton's backward pass at r = 16 in three launches",
    "triton_one_launch": "Triton's backward pass at r = 16 in one launch and a sum",
}
_LAST = 30  # lines of a log that are shown


def phases(logs: Path) -> list[dict[str, Any]]:
    """How each phase ended, with the line of its output that says most."""
    found = []
    for line in (logs / "phases.tsv").read_text().splitlines():
        name, *numbers = line.split("\t")
        rc, seconds, limit = map(int, numbers)
        text = (logs / f"{name}.log").read_text(errors="replace")
        found.append(
            {
                "phase": name,
                "rc": rc,
                "ended": _ENDED.get(rc, "failed"),
                "seconds": seconds,
                "limit": limit,
                "said": telling_line(text),
            }
        )
    return found


def telling_line(text: str) -> str:
    """pytest's or compute-sanitizer's summary, else the last line."""
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    for pattern in (r"ERROR SUMMARY: ", r"\d+ calls ran", r"\d+ (passed|failed|deselected|skipped)"):
        matches = [line for line in lines if re.search(pattern, line)]
        if matches:
            return matches[-1]
    return lines[-1] if lines else ""


def moved_section(record: dict[str, Any]) -> str:
    """Bytes read from the device's counters beside those counted by formula."""
    rows = [(row["operator"], row["provider"], *_moved_cells(row)) for row in record["rows"]]
    head = ("operator", "provider", "kernels", "moved, MB", "counted, MB", "moved / counted")
    title = f"## Bytes that memory moved ({name_of(record['case'])})"
    return title + "\n\n" + table(head, rows, left=2)


def _moved_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "read" not in row:
        return "-", row["reason"], "-", "-"
    counted = row["counted"]
    ratio = "-" if counted is None else f"{row['read'] / counted:.2f}"
    return str(row["kernels"]), f"{row['read'] / 1e6:.1f}", "-" if counted is None else f"{counted / 1e6:.1f}", ratio


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "logs" / "phases.tsv").is_file():
        sys.exit("usage: python benchmarks/gpu_summary.py OUT (a folder that benchmarks/gpu.sh wrote)")
    out = Path(sys.argv[1])
    ended = phases(out / "logs")
    head = ("phase", "ended", "exit status", "s", "limit, s", "said")
    rows = [
        (p["phase"], p["ended"], str(p["rc"]), str(p["seconds"]), str(p["limit"]), p["said"].replace("|", "/"))
        for p in ended
    ]
    parts = ["# What ran on the GPU", table(head, rows, left=2)]
    if find(out) is not None:
        report = read(out)
        if not (out / MARKDOWN).is_file():  # the phase was ended before it had finished
            write(report, out)
        ended_early = "" if report.get("complete", True) else " It was ended before it was done."
        parts.append(f"Figures: [{MARKDOWN}]({MARKDOWN}), on {report['machine']['device']}.{ended_early}")
        if (out / UNFINISHED).is_file():
            parts.append(
                f"They are of an earlier run; the last was ended before it was done: [{UNFINISHED}]({UNFINISHED})."
            )
        parts += [goals_section(report)] if answers(report) else []
    for name, title in _FURTHER.items():
        if find(out / "logs" / name) is not None:
            records = read(out / "logs" / name)["kernels"]
            parts.append(f"## {title}\n\n" + "\n\n".join(map(kernel_section, records)))
    for table_file in sorted((out / "choice").glob("*.json")):
        operators = Table(table_file, json.loads(table_file.read_text())).summary()
        title = f"## The fastest backend ([choice/{table_file.name}](choice/{table_file.name}))"
        parts.append(title + "\n\n" + table(("operator", "runs"), list(operators.items()), left=2))
    moved = out / "logs" / "dram_bytes.json"
    if moved.is_file():
        parts.append(moved_section(json.loads(moved.read_text())))
    for phase in ended:
        if phase["ended"] not in _PASSED:
            last = (out / "logs" / f"{phase['phase']}.log").read_text(errors="replace").splitlines()[-_LAST:]
            parts.append(f"## {phase['phase']}\n\n```\n" + "\n".join(last) + "\n```")
    write_json(out / "logs" / "phases.json", {"phases": ended})
    write_text(out / "summary.md", "\n\n".join(parts) + "\n")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(out / "logs", "logs")
    shutil.rmtree(out / "logs")
    print("\n\n".join(parts))
    if any(phase["ended"] not in _PASSED and phase["phase"] not in _MAY_FAIL for phase in ended):
        sys.exit(1)


if __name__ == "__main__":
    main()
