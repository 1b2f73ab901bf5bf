"""Two reports side by side: what became slower beyond the noise, what became faster, what went missing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from mosa_kernels.bench.records import Record, has_failed, is_disturbed, timings
from mosa_kernels.bench.report import table

LEAST_CHANGE = 0.05
"""A change counts where it is more than this, each median lies outside the other's 20th to 80th percentile, no run of
one side lies among those of the other, and what is not ours, measured beside it, did not move as much."""


BUSY = 0.2
"""Of the times that are not ours: where more are disturbed, the machine had other work, and no time says anything."""


class Difference(NamedTuple):
    """One provider on one case in both reports."""

    name: tuple[str, str, str]  # operator, case, provider
    before: float | None  # median in ms; None: there is none
    after: float | None
    verdict: str  # "slower", "faster", "same", "undecided", "lost" (there, without a figure), "absent", "new", "wrong"
    ours: bool  # whether it is ours to mend
    reason: str | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.before is None or self.after is None else self.after / self.before


def compare(before: Record, after: Record) -> list[Difference]:
    """Everything that either report has a time for, and what of ours is wrong or fails in the second alone."""
    old, new = dict(timings(before)), dict(timings(after))
    machine: dict[tuple[str, str], list[float]] = {}  # per case what became of the times that are not ours
    for name in old.keys() & new.keys():
        a, b = old[name], new[name]
        if "ms" in a and "ms" in b and not a["ours"]:
            machine.setdefault(name[:2], []).append(b["ms"]["median"] / a["ms"]["median"])
    noisy = busy(before) or busy(after)
    found = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name, {}), new.get(name, {})
        ours = bool((a or b)["ours"])
        if "ms" in a and "ms" in b:
            verdict = _verdict(a, b, machine.get(name[:2], ()) if ours else ())
            if ours and verdict != "same" and (noisy or is_disturbed(a["ms"]) or is_disturbed(b["ms"])):
                verdict = "undecided"
            found.append(Difference(name, a["ms"]["median"], b["ms"]["median"], verdict, ours))
        elif "ms" in a:
            reason = b.get("reason") or "it was not measured"
            found.append(Difference(name, a["ms"]["median"], None, "lost" if b else "absent", ours, reason))
        elif "ms" in b:
            found.append(Difference(name, None, b["ms"]["median"], "new", ours))
        elif ours and has_failed(b) and not has_failed(a):
            found.append(Difference(name, None, None, "wrong", ours, b["reason"]))
    return found


def regressions(differences: list[Difference]) -> list[Difference]:
    """What of ours is slower, wrong, or has no figure any more. A case that the second report does not have is none."""
    return [each for each in differences if each.ours and each.verdict in ("slower", "lost", "wrong")]


def broken(before: Record, after: Record) -> list[str]:
    """The cases that broke as a whole in the second report, and not in the first."""
    return [line for line in after.get("broken", []) if line not in before.get("broken", [])]


def busy(report: Record) -> bool:
    """Whether the machine had other work while it was measured."""
    others = [is_disturbed(row["ms"]) for _, row in timings(report) if "ms" in row and not row["ours"]]
    return sum(others) > BUSY * len(others)


def same_device(before: Record, after: Record) -> bool:
    """Whether times of the two say something about the code."""
    return before["machine"]["device"] == after["machine"]["device"]


def markdown(before: Record, after: Record, names: tuple[str, str], differences: list[Difference]) -> str:
    """The regressions first, then everything; of different devices, the figures alone."""
    bad, broke = regressions(differences), broken(before, after)
    parts = [f"# {names[1]} against {names[0]}"]
    parts += [f"Note: {note}." for note in caveats(before, after)]
    if same_device(before, after):
        parts.append(f"{len(bad)} regression(s) beyond the noise." if bad else "No regression beyond the noise.")
        undecided = sum(d.verdict == "undecided" for d in differences)
        if undecided:
            parts.append(
                f"{undecided} undecided: what is not ours moved too, so the machine may have, or times were disturbed. "
                "Measure again when it has no other work."
            )
        others = [d for d in differences if not d.ours and d.verdict == "slower"]
        if others:
            parts.append(f"{len(others)} of what is not ours became slower too: the machine may have.")
    else:
        parts.append("The reports are not comparable: other devices have other times, whatever became of the code.")
        bad, differences = [], [difference._replace(verdict="") for difference in differences]
    if broke:
        parts.append(f"{len(broke)} case(s) broke:\n\n" + "\n".join(f"- {line}" for line in broke))
    if not any(difference.ratio for difference in differences):
        parts.append("The reports have no case in common.")
    for title, chosen in (("Regressions", bad), ("Everything", differences)):
        if chosen:
            parts.append(f"## {title}\n\n" + table(_HEAD, [_line(difference) for difference in chosen], left=3))
    return "\n\n".join(parts) + "\n"


_ALIKE = {
    "device": "device",
    "threads": "number of threads",
    "allocator": "allocator",
    "compiled_cpu_kernels": "kernels compiled for the CPU",
    "compiled_cuda_kernels": "kernels compiled for CUDA",
    "driver": "driver",
    "power_limit": "power limit",
    "most_sm_clock": "highest clock",
}
_CLOCKS = {"sm_clock": "clock", "memory_clock": "memory clock"}
_CLOCK_CHANGE = 0.03  # of a clock, which is never twice the same


def caveats(before: Record, after: Record) -> list[str]:
    """What else differs between the two."""
    found = []
    for which, report in (("first", before), ("second", after)):
        if not report.get("complete", True):
            found.append(f"the {which} report was ended before it was done")
        if busy(report):
            found.append(f"the machine had other work during the {which} report")
    for what, name in (("preset", "preset"), ("--processor-time", "processor_time")):
        a, b = (report.get(name, report.get("request", {}).get(name)) for report in (before, after))
        if a != b:
            found.append(f"{what} differs: {a} and {b}")
    machines = [{**report["machine"], **(report["machine"].get("gpu") or {})} for report in (before, after)]
    for key, what in {**_ALIKE, **_CLOCKS}.items():
        a, b = (machine.get(key) for machine in machines)
        if a != b and not (key in _CLOCKS and _close(a, b)):
            found.append(f"the {what} differs: {a} and {b}")
    versions = [machine["versions"] for machine in machines]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        a, b = (version.get(package) for version in versions)
        if a != b and package != "mosa_kernels":
            found.append(f"{package} differs: {a} and {b}")
    return found


def _close(a: str | None, b: str | None) -> bool:
    """Of clocks such as "1980 MHz"."""
    try:
        x, y = (float(str(clock).split()[0]) for clock in (a, b))
    except (ValueError, IndexError):
        return False
    return abs(x - y) <= _CLOCK_CHANGE * max(x, y)


_HEAD = ("part", "case", "provider", "before, ms", "after, ms", "after / before", "")


def _line(difference: Difference) -> tuple[str, ...]:
    before, after, ratio = (
        "-" if value is None else f"{value:.4g}" for value in (difference.before, difference.after, difference.ratio)
    )
    words = ": ".join(filter(None, (difference.verdict, difference.reason)))
    return (*difference.name, before, after, ratio, words)


def _verdict(a: Record, b: Record, machine: Sequence[float]) -> str:
    """Of one row, given what became of the times beside it that are not ours: those move with the machine alone."""
    runs = [row.get("medians") or [row["ms"]["median"]] for row in (a, b)]
    margin = max(1 + LEAST_CHANGE, *(max(times) / min(times) for times in runs))
    for verdict, x, y, (fast, slow) in (("slower", a["ms"], b["ms"], runs), ("faster", b["ms"], a["ms"], runs[::-1])):
        change = min(slow) / max(fast)
        if change > margin and y["median"] > x["p80"] and x["median"] < y["p20"]:
            if not machine:
                return verdict
            shift = median(machine) if verdict == "slower" else 1 / median(machine)
            moved = max(max(ratio, 1 / ratio) for ratio in machine)
            return verdict if change / shift > margin * moved else "undecided"
    return "same"
