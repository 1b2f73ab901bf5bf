"""A table as a picture: our means with their spread and every seed, and beside them the paper's, or each task; a sweep
as curves; differences by task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosa_kernels.data.published import GROUPS
from mosa_kernels.train.comparison_report import spread
from mosa_kernels.train.plots import save_figure
from mosa_kernels.train.table_summary import GROUP_MEAN, MEAN, Difference, Summary, printed_mean

COLOURS = {"paper": "#4c72b0", "control": "#8c8c8c", "ours": "#2f8f83"}
PRINTED = "#c44e52"
MOST_TASKS = 4  # that a picture shows one by one


def draw_table(summaries: Sequence[Summary], title: str, path: Path) -> None:
    """Writes the PNG.

    Args:
        summaries: of `summarise_table`.
        title: over the picture.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    printed = [printed_mean(s.row) for s in summaries]
    known = [value for value in printed if value is not None]
    columns = _columns_of(summaries, bool(known))
    panels = len(columns) + bool(known)
    figure: Any = Figure(figsize=(4 + 4 * panels, 1.8 + 0.42 * len(summaries)), layout="constrained")
    figure.suptitle(f"{title}\npercent, ± over seeds; controls in grey, ours in green; axes cut", fontsize=10)
    every = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axes, column in zip(every, columns, strict=False):
        for place, summary in enumerate(summaries):
            value = summary.values[column]
            if value.by_seed:
                colour = COLOURS[summary.row.origin]
                axes.barh(place, value.mean, xerr=value.spread, color=colour, height=0.7, capsize=3)
                axes.plot(value.by_seed, [place] * len(value.by_seed), "k.", markersize=4)
                axes.text(max(*value.by_seed, value.mean + value.spread), place, f" {value}", va="center", fontsize=8)
        _cut(axes, [point for summary in summaries for point in summary.values[column].by_seed])
        axes.set_title(
            ("here, mean over tasks" if known else "mean over tasks") if column == MEAN else column, fontsize=9
        )
    if known:
        for place, figure_of_paper in enumerate(printed):
            if figure_of_paper is not None:
                every[-1].barh(place, figure_of_paper, color=PRINTED, height=0.7)
                every[-1].text(figure_of_paper, place, f" {figure_of_paper:.2f}", va="center", fontsize=8)
        _cut(every[-1], known)
        every[-1].set_title("the paper, on its own data sets", fontsize=9)
    every[0].set_yticks(range(len(summaries)), [summary.row.title for summary in summaries], fontsize=8)
    every[0].invert_yaxis()
    for axes in every:
        axes.set_xlabel("%")
        axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def _columns_of(summaries: Sequence[Summary], beside_the_paper: bool) -> list[str]:
    """The mean alone beside the paper's, or of many tasks; else a few tasks one by one, and their mean."""
    tasks = [name for name in summaries[0].values if name not in (MEAN, GROUP_MEAN, *GROUPS)]
    if beside_the_paper or len(tasks) > MOST_TASKS:
        return [MEAN]
    return tasks if len(tasks) == 1 else [*tasks, MEAN]


def draw_sweep(summaries: Sequence[Summary], option: str, title: str, path: Path) -> None:
    """Writes the PNG of a sweep: a curve a method, with the spread over seeds and every seed.

    Args:
        summaries: of `summarise_table`, of rows with a swept value.
        option: that is swept.
        title: over the picture.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    variants = list(dict.fromkeys(summary.row.variant for summary in summaries))
    for number, variant in enumerate(variants):
        rows = [s for s in summaries if s.row.variant == variant and s.values[MEAN].by_seed]
        # a little apart, so that the seeds of one method do not hide another's
        places = [s.row.swept * 2 ** (0.06 * (number - (len(variants) - 1) / 2)) for s in rows if s.row.swept]
        values = [s.values[MEAN] for s in rows]
        label = rows[0].row.title.rpartition(",")[0] if rows else variant
        dashes = "-" if rows and rows[0].row.origin == "paper" else "--"
        lines = axes.errorbar(
            places, [v.mean for v in values], [v.spread for v in values], fmt=f"o{dashes}", capsize=3, label=label
        )
        for place, value in zip(places, values, strict=True):
            axes.plot([place] * len(value.by_seed), value.by_seed, ".", color=lines[0].get_color(), markersize=3)
    ticks = sorted({s.row.swept for s in summaries if s.row.swept})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set(xlabel=option, ylabel="test accuracy, %: mean over tasks, ± over seeds", title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_by_task(differences: Sequence[Difference], title: str, path: Path) -> None:
    """Writes the PNG of differences told task by task: a panel for each row that others are held against.

    Args:
        differences: of `differences_of`, each with its task.
        title: over the picture.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    rivals = list(dict.fromkeys(each.worse for each in differences))
    tasks = list(dict.fromkeys(each.task for each in differences))
    titles = list(dict.fromkeys(each.better for each in differences))
    figure: Any = Figure(figsize=(3 + 3.5 * len(rivals), 2.4 + 0.42 * len(tasks)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, len(rivals), sharey=True, squeeze=False)[0]
    for axes, rival in zip(panels, rivals, strict=True):
        for number, name in enumerate(titles):
            shown = [each for each in differences if each.worse == rival and each.better == name and each.points]
            # a little apart, so that the seeds of one method do not hide another's
            places = [tasks.index(each.task) + 0.2 * (number - (len(titles) - 1) / 2) for each in shown]
            spreads = [spread(each.points) for each in shown]
            drawn = axes.errorbar([each.mean for each in shown], places, xerr=spreads, fmt="o", capsize=3, label=name)
            for place, each in zip(places, shown, strict=True):
                axes.plot(each.points, [place] * len(each.points), ".", color=drawn[0].get_color(), markersize=3)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_title(f"against {rival}", fontsize=9)
        axes.set_xlabel("points, ± over seeds")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(tasks)), tasks, fontsize=8)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8)
    save_figure(figure, path)


def _cut(axes: Any, values: Sequence[float]) -> None:
    """Shows the range of the values, with room for their text."""
    if values:
        room = max(1.0, 0.2 * (max(values) - min(values)))
        axes.set_xlim(max(0.0, min(values) - 2 * room), max(values) + 4 * room)
