"""Two reports side by side: what became slower beyond the noise, what became faster, what went missing."""

from __future__ import annotations

from typing import NamedTuple

from mosa_kernels.bench.records import Record, timings
from mosa_kernels.bench.report import table

LEAST_CHANGE = 0.05
"""A change counts where it is more than this and each median lies outside the other's 20th to 80th percentile."""


class Difference(NamedTuple):
    """One provider on one case in both reports."""

    name: tuple[str, str, str]  # operator, case, provider
    before: float | None  # median in ms; None: there is none
    after: float | None
    verdict: str  # "slower", "faster", "same", "lost" (there, without a figure), "absent" (not there), "new"
    ours: bool  # whether it is ours to mend
    reason: str | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.before is None or self.after is None else self.after / self.before


def compare(before: Record, after: Record) -> list[Difference]:
    """Everything that either report has a time for."""
    old, new = dict(timings(before)), dict(timings(after))
    found = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name, {}), new.get(name, {})
        ours = bool((a or b)["ours"])
        if "ms" in a and "ms" in b:
            found.append(Difference(name, a["ms"]["median"], b["ms"]["median"], _verdict(a["ms"], b["ms"]), ours))
        elif "ms" in a:
            reason = b.get("reason") or "it was not measured"
            found.append(Difference(name, a["ms"]["median"], None, "lost" if b else "absent", ours, reason))
        elif "ms" in b:
            found.append(Difference(name, None, b["ms"]["median"], "new", ours))
    return found


def regressions(differences: list[Difference]) -> list[Difference]:
    """What of ours is slower, or has no figure any more. A case that the second report does not have is none."""
    return [difference for difference in differences if difference.ours and difference.verdict in ("slower", "lost")]


def markdown(before: Record, after: Record, names: tuple[str, str], differences: list[Difference]) -> str:
    """The regressions first, then everything."""
    bad = regressions(differences)
    parts = [f"# {names[1]} against {names[0]}"]
    parts += [f"Note: {note}." for note in caveats(before, after)]
    parts.append(f"{len(bad)} regression(s) beyond the noise." if bad else "No regression beyond the noise.")
    others = [d for d in differences if not d.ours and d.verdict == "slower"]
    if others:
        parts.append(f"{len(others)} of what is not ours became slower too: the machine may have.")
    if not any(difference.ratio for difference in differences):
        parts.append("The reports have no case in common.")
    for title, chosen in (("Regressions", bad), ("Everything", differences)):
        if chosen:
            parts.append(f"## {title}\n\n" + table(_HEAD, [_line(difference) for difference in chosen], left=3))
    return "\n\n".join(parts) + "\n"


def caveats(before: Record, after: Record) -> list[str]:
    """What else differs between the two."""
    found = []
    for what, key in (("device", "device"), ("number of threads", "threads")):
        a, b = before["machine"][key], after["machine"][key]
        if a != b:
            found.append(f"the {what} differs: {a} and {b}")
    versions = before["machine"]["versions"], after["machine"]["versions"]
    for package in sorted(versions[0].keys() | versions[1].keys()):
        a, b = (version.get(package) for version in versions)
        if a != b and package != "mosa_kernels":
            found.append(f"{package} differs: {a} and {b}")
    return found


_HEAD = ("part", "case", "provider", "before, ms", "after, ms", "after / before", "")


def _line(difference: Difference) -> tuple[str, ...]:
    before, after, ratio = (
        "-" if value is None else f"{value:.4g}" for value in (difference.before, difference.after, difference.ratio)
    )
    words = difference.verdict if difference.reason is None else f"{difference.verdict}: {difference.reason}"
    return (*difference.name, before, after, ratio, words)


def _verdict(a: Record, b: Record) -> str:
    if b["median"] > (1 + LEAST_CHANGE) * a["median"] and b["median"] > a["p80"] and a["median"] < b["p20"]:
        return "slower"
    if a["median"] > (1 + LEAST_CHANGE) * b["median"] and a["median"] > b["p80"] and b["median"] < a["p20"]:
        return "faster"
    return "same"
