"""A report as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosa_kernels.bench.records import Record, comparable, name_of
from mosa_kernels.train.plots import save_figure

COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#4c72b0",
    "compile max-autotune": "#55a3c9",
    "N copies": "#c44e52",
    "cpu": "#2f8f83",
    "triton": "#2f8f83",
    "cuda": "#dd8452",
    "merged dense": "#937860",
}
_OTHER = "#64b5cd"
PICTURES = ("kernels.png", "models.png", "growth.png")


def draw(report: Record, folder: Path) -> list[str]:
    """Writes the pictures that the report has figures for, and returns their names."""
    drawn = []
    for name, make in zip(PICTURES, (_kernels, _models, _growth), strict=True):
        figure = make(report)
        if figure is not None:
            figure.suptitle(f"{report['machine']['device']}, {report['machine']['made'][:10]}", fontsize=10)
            save_figure(figure, folder / name)
            drawn.append(name)
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    return Figure(figsize=(width, height), layout="constrained")


def _kernels(report: Record) -> Any:
    """For each operator, how many times as fast as eager PyTorch every provider is."""
    by_operator: dict[str, list[Record]] = {}
    for record in report.get("kernels", []):
        if _bars(record):
            by_operator.setdefault(record["operator"], []).append(record)
    if not by_operator:
        return None
    bars = [sum(len(_bars(record)) + 1 for record in records) for records in by_operator.values()]
    figure = _figure(10, 1.0 + 0.19 * sum(bars) + 0.5 * len(bars))
    areas = figure.subplots(len(bars), 1, height_ratios=bars, squeeze=False)[:, 0]
    for axes, (operator, records) in zip(areas, by_operator.items(), strict=True):
        place, ticks = 0.0, []
        for record in records:
            rows = _bars(record)
            for row in rows:
                colour = COLOURS.get(row["provider"].partition(",")[0], _OTHER)
                axes.barh(place, row["speed_up"], color=colour, height=0.85)
                label = f" {row['provider']}, {row['ms']['median']:.3g} ms"
                axes.text(row["speed_up"], place, label, va="center", fontsize=6)
                place += 1
            ticks.append((place - len(rows) / 2 - 0.5, name_of(record["case"])))
            place += 1
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=6)
        axes.axvline(1, color="black", linewidth=0.6)
        axes.invert_yaxis()
        axes.margins(x=0.25, y=0.01)
        axes.set_xlim(left=0)
        axes.set_title(f"{operator}: times as fast as eager PyTorch", fontsize=8)
        axes.tick_params(axis="x", labelsize=6)
    return figure


def _bars(record: Record) -> list[Record]:
    """What is drawn of a case: of the providers of another function, the merged adapter alone."""
    return [
        row for row in record["rows"] if "speed_up" in row and (comparable(row) or row["provider"] == "merged dense")
    ]


def _models(report: Record) -> Any:
    records = [record for record in report.get("models", []) if any("ms" in row for row in record["training"])]
    if not records:
        return None
    figure = _figure(11, 0.8 + 2.6 * len(records))
    for (left, right), record in zip(figure.subplots(len(records), 2, squeeze=False), records, strict=True):
        for axes, part in ((left, "training"), (right, "inference")):
            rows = [row for row in record[part] if "ms" in row]
            axes.barh([row["variant"] for row in rows], [row["images_per_second"] for row in rows], color="#2f8f83")
            axes.invert_yaxis()
            title = f"{name_of(record['case'])}\ntraining, images/s" if part == "training" else "inference, images/s"
            axes.set_title(title, fontsize=7, loc="left")
            axes.tick_params(labelsize=6)
    return figure


def _growth(report: Record) -> Any:
    records = report.get("growth", [])
    axes_names = list(dict.fromkeys(record["axis"] for record in records))
    if not records:
        return None
    figure = _figure(3.2 * len(axes_names), 6)
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        mine = [record for record in records if record["axis"] == axis]
        times, memory = grid[0][column], grid[1][column]
        for name in _timed(mine):
            rows = [(r["value"], row) for r in mine for row in r["rows"] if row["provider"] == name and "ms" in row]
            style = {"color": COLOURS.get(name, _OTHER), "marker": "o", "markersize": 3, "label": name}
            times.plot([value for value, _ in rows], [row["ms"]["median"] for _, row in rows], **style)
            low, high = ([row["ms"][key] for _, row in rows] for key in ("p20", "p80"))
            times.fill_between([value for value, _ in rows], low, high, color=style["color"], alpha=0.2)
            sizes = [(value, row.get("saved_bytes"), row.get("state_bytes") or 0) for value, row in rows]
            kept = [(value, (saved + state) / 2**20) for value, saved, state in sizes if saved is not None]
            memory.plot([value for value, _ in kept], [size for _, size in kept], **style)
        for area, label in ((times, "ms, forward + backward"), (memory, "MiB saved and trained state")):
            area.set(xscale="log", yscale="log", xlabel=axis, ylabel=label if column == 0 else "")
            values = sorted({record["value"] for record in mine})
            area.set_xticks(values, [str(value) for value in values])
            area.set_xticks([], minor=True)
            area.yaxis.set_major_formatter("{x:g}")
            area.yaxis.set_minor_formatter("{x:g}")
            area.grid(alpha=0.3, which="both")
            area.tick_params(labelsize=7, which="both")
        if column == 0:
            times.legend(fontsize=6)
    return figure


def _timed(records: Sequence[Record]) -> list[str]:
    rows = [row for record in records for row in record["rows"] if "ms" in row and comparable(row)]
    return list(dict.fromkeys(row["provider"] for row in rows))
