"""Reading a report: the figures of one provider on one case, by what names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FORMAT = 1
"""Of report.json; readers refuse another one."""

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


def fastest_of_ours(record: Record) -> Record | None:
    timed = [row for row in record["rows"] if row["ours"] and "ms" in row]
    return min(timed, key=lambda row: row["ms"]["median"], default=None)


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


def failures(report: Record) -> list[str]:
    """What broke as a whole, and what of ours was there and gave a wrong result or none."""
    return list(report.get("broken", [])) + [
        f"{part}, {case}, {provider}: {row['reason']}"
        for (part, case, provider), row in timings(report)
        if row["status"] in ("red", "failed") and row["ours"]
    ]


def losses(report: Record) -> list[str]:
    """Where another provider of the same function is faster than the best of ours."""
    found = []
    for record in report.get("kernels", []) + report.get("growth", []):
        ours = fastest_of_ours(record)
        rivals = [row for row in record["rows"] if not row["ours"] and "ms" in row and comparable(row)]
        best = min(rivals, key=lambda row: row["ms"]["median"], default=None)
        if ours is None or best is None or best["ms"]["median"] >= ours["ms"]["median"]:
            continue
        times = ours["ms"]["median"] / best["ms"]["median"]
        close = best["ms"]["p80"] >= ours["ms"]["p20"]
        found.append(
            f"{record['operator']}, {name_of(record['case'])}: {best['provider']} is {times:.2f} times as fast as "
            f"{ours['provider']}" + (" (within the spread)" if close else "")
        )
    return list(dict.fromkeys(found))


def comparable(row: Record) -> bool:
    """Whether a row computes what ours do: the merged adapter and the dense optimizer step do less."""
    return row["provider"] != "merged dense" and not row["provider"].startswith("AdamW")
