"""Reading a report: the figures of one provider on one case, by what names them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

FORMAT = 1
"""Of report.json; readers refuse another one."""

DISTURBED = 1.5
"""The 80th percentile over the 20th, beyond which a time is disturbed: some 1.1 on a machine that does nothing else."""

Record = dict[str, Any]


_MACHINE = ("device", "device_type", "threads", "versions")
_LISTS: dict[str, tuple[str, ...]] = {
    "kernels": ("operator", "case", "rows"),
    "models": ("case", "training", "inference"),
    "growth": ("operator", "case", "rows", "axis", "value"),
}
_ROW = ("ours", "status")


def missing_in(report: Record) -> str | None:
    """The first thing that a report of this format has and this one has not, such as "machine.device"."""
    parts: list[tuple[str, Any, tuple[str, ...]]] = [("machine", report.get("machine"), _MACHINE)]
    for part, names in _LISTS.items():
        for number, record in enumerate(report.get(part, [])):
            parts.append((f"{part}[{number}]", record, names))
            for kind in ("rows", "training", "inference"):
                for line, row in enumerate(record.get(kind, []) if isinstance(record, dict) else []):
                    place = f"{part}[{number}].{kind}[{line}]"
                    parts.append((place, row, ("provider" if kind == "rows" else "variant", *_ROW)))
                    if isinstance(row, dict) and "ms" in row:
                        parts.append((f"{place}.ms", row["ms"], ("median", "p20", "p80")))
    for place, found, names in parts:
        if not isinstance(found, dict):
            return place
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            return f"{place}.{missing}"
    return None


def name_of(case: dict[str, Any]) -> str:
    """A case in words: its key without what is usual."""
    parts = []
    for key, value in case.items():
        if key == "layers":
            if value != 1:
                parts.append(f"{value} layers")
        elif key in ("shape", "dtype", "model", "precision"):
            parts.append(str(value))
        elif key == "expert per":
            parts.append(f"expert per {value}")
        else:
            parts.append(f"{key} {value}")
    return ", ".join(parts)


def row_of(record: Record, provider: str) -> Record | None:
    """A provider's row where it was timed."""
    return next((row for row in record["rows"] if row["provider"] == provider and "ms" in row), None)


def same_calls(report: Record, record: Record, provider: str) -> list[tuple[Record, Record]]:
    """(record, the provider's row) of a case's own record and of those that time the same call again, for splits."""
    found = [(record, row_of(record, provider))]
    title = {"adapter_forward": "forward", "adapter": "forward + backward"}.get(record["operator"])
    for other in report.get("kernels", []):
        if other["operator"] == "granularity" and other["case"] == {**record["case"], "pass": title}:
            found.append((other, row_of(other, f"{provider}, element")))
    return [(each, row) for each, row in found if row is not None]


def fastest_of_ours(record: Record) -> Record | None:
    timed = [row for row in record["rows"] if row["ours"] and "ms" in row]
    return min(timed, key=lambda row: row["ms"]["median"], default=None)


def is_disturbed(ms: Record) -> bool:
    """Whether a call took now more, now less time, as where the machine has other work."""
    return bool(ms["p80"] > DISTURBED * ms["p20"])


def disturbed(record: Record) -> list[str]:
    """The providers or variants of a case whose times were."""
    rows = [row for part in ("rows", "training", "inference") for row in record.get(part, [])]
    return [_name(row) for row in rows if "ms" in row and is_disturbed(row["ms"])]


def timings(report: Record) -> Iterator[tuple[tuple[str, str, str], Record]]:
    """((part, case, provider or variant), row) of everything that a report lists."""
    for record in report.get("kernels", []):
        for row in record["rows"]:
            yield (record["operator"], name_of(record["case"]), row["provider"]), row
    for record in report.get("growth", []):
        for row in record["rows"]:
            yield (f"growth with {record['axis']}", name_of(record["case"]), row["provider"]), row
    for record in report.get("models", []):
        for part in ("training", "inference"):
            for row in record[part]:
                yield (f"model, {part}", name_of(record["case"]), row["variant"]), row


def has_failed(row: Record) -> bool:
    """Whether it was there and gave a wrong result or none."""
    return row.get("status") in ("red", "failed")


def failures(report: Record) -> list[str]:
    """What broke as a whole, and what of ours was there and gave a wrong result or none."""
    return list(report.get("broken", [])) + [
        f"{part}, {case}, {provider}: {row['reason']}"
        for (part, case, provider), row in timings(report)
        if has_failed(row) and row["ours"]
    ]


def losses(report: Record) -> list[str]:
    """Where another provider of the same function, or a plain optimizer step, is faster than the best of ours."""
    found = []
    for part, rows in _races(report):
        timed = [row for row in rows if "ms" in row]
        ours = min((row for row in timed if row["ours"]), key=_median, default=None)
        best = min((row for row in timed if not row["ours"]), key=_median, default=None)
        if ours is None or best is None or _median(best) >= _median(ours):
            continue
        close = best["ms"]["p80"] >= ours["ms"]["p20"]
        found.append(
            f"{part}: {_name(best)} is {_median(ours) / _median(best):.2f} times as fast as {_name(ours)}"
            + (" (within the spread)" if close else "")
        )
    return list(dict.fromkeys(found))


def _races(report: Record) -> Iterator[tuple[str, list[Record]]]:
    """Rows that do the same, and what that is; a variant of a model races with those that differ by the provider."""
    for record in report.get("kernels", []) + report.get("growth", []):
        rows = [row for row in record["rows"] if row["provider"] != "merged dense"]
        yield f"{record['operator']}, {name_of(record['case'])}", rows
    for record in report.get("models", []):
        for part in ("training", "inference"):
            kinds: dict[str, list[Record]] = {}
            for row in record[part]:
                kinds.setdefault(_PROVIDER.sub("", row["variant"]), []).append(row)
            yield from ((f"model, {part}, {name_of(record['case'])}", rows) for rows in kinds.values())


_PROVIDER = re.compile(r" (eager|N copies|cpu|triton|cuda)(?=,|$)")


def _name(row: Record) -> str:
    return str(row.get("provider") or row["variant"])


def _median(row: Record) -> float:
    return float(row["ms"]["median"])


def is_slower(row: Record, rows: list[Record]) -> bool:
    """Whether a row of ours has a faster rival among these."""
    rivals = [other for other in rows if not other["ours"] and "ms" in other and comparable(other)]
    return bool(row["ours"]) and "ms" in row and any(_median(other) < _median(row) for other in rivals)


def comparable(row: Record) -> bool:
    """Whether a row computes what ours do: the merged adapter and the dense optimizer step do less."""
    return row["provider"] != "merged dense" and not row["provider"].startswith("AdamW")
