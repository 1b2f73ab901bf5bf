"""The comparison as one picture: the images, accuracies with their spread, inference mechanisms, training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mosa_kernels.data.splits import DataSplits
from mosa_kernels.train.comparison import Outcome
from mosa_kernels.train.comparison_report import MECHANISM_TITLES, Summary
from mosa_kernels.train.plots import save_figure

STRIP = 14  # images shown
COLOURS = ("#8c8c8c", "#4c72b0", "#55a3c9", "#2f8f83", "#dd8452", "#c44e52", "#8172b3")


def draw_comparison(
    summaries: Sequence[Summary], outcomes: Sequence[Outcome], splits: DataSplits, path: Path, note: str
) -> None:
    """Writes the PNG.

    Args:
        summaries, outcomes: from `summarise` and the runs.
        splits: whose training images are shown.
        path: of the PNG.
        note: one line under the title.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13, 9.5), layout="constrained")
    strip, middle, curves = figure.subfigures(3, 1, height_ratios=(1.15, 4.2, 3.4))
    figure.suptitle(f"Handwritten digits in clutter, 20 labels a class\n{note}", fontsize=12)
    _images(strip, splits)
    left, right = middle.subplots(1, 2)
    _methods(left, summaries)
    _mechanisms(right, summaries)
    _curves(curves, outcomes, [summary.contender.key for summary in summaries])
    save_figure(figure, path)


def _images(area: Any, splits: DataSplits) -> None:
    for number, axes in enumerate(area.subplots(1, STRIP)):
        image, label = splits.train[number]
        axes.imshow(np.asarray(image), interpolation="nearest")
        axes.set_title(splits.classes[label], fontsize=9, pad=2)
        axes.axis("off")


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _methods(axes: Any, summaries: Sequence[Summary]) -> None:
    places = range(len(summaries))
    for place, summary in enumerate(summaries):
        axes.barh(place, summary.accuracy, xerr=summary.spread, color=_colour(place), capsize=3, height=0.7)
        axes.plot(summary.accuracies, [place] * len(summary.accuracies), "k.", markersize=4)
        text = f" {summary.accuracy:.1f} ± {summary.spread:.1f} %\n NLL {summary.nll:.2f}"
        axes.text(max(summary.accuracies) + summary.spread, place, text, va="center", fontsize=8)
    low = min(min(summary.accuracies) for summary in summaries)
    high = max(max(summary.accuracies) + summary.spread for summary in summaries)
    margin = max(2.0, 0.15 * (high - low))
    axes.set_xlim(max(0.0, low - 3 * margin), high + 2.5 * margin)
    axes.set_yticks(places, [summary.contender.title for summary in summaries], fontsize=9)
    axes.invert_yaxis()
    axes.set_title("test accuracy, mean and spread over seeds (axis cut)", fontsize=10)
    axes.set_xlabel("%")
    axes.grid(axis="x", alpha=0.3)


def _mechanisms(axes: Any, summaries: Sequence[Summary]) -> None:
    mosa = [summary for summary in summaries if summary.contender.method == "mosa"]
    names = [name for name in MECHANISM_TITLES if any(name in summary.mechanisms for summary in mosa)]
    places = np.arange(len(names))
    height = 0.8 / max(1, len(mosa))
    for number, summary in enumerate(mosa):
        values = [summary.mechanisms[name]["accuracy"] for name in names]
        spreads = [summary.mechanisms[name]["accuracy_spread"] for name in names]
        offset = (number - (len(mosa) - 1) / 2) * height
        colour = _colour(len(summaries) - len(mosa) + number)
        axes.barh(places + offset, values, height, xerr=spreads, color=colour, capsize=2, label=summary.contender.title)
        for place, value in zip(places, values, strict=True):
            axes.text(2, place + offset, f"{value:.1f}", va="center", fontsize=8, color="white")
    axes.set_yticks(places, [MECHANISM_TITLES[name] for name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set_title("the same MoSA weights, used differently", fontsize=10)
    axes.set_xlabel("%")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1)
    axes.grid(axis="x", alpha=0.3)


def _curves(area: Any, outcomes: Sequence[Outcome], keys: Sequence[str]) -> None:
    """Means over seeds; the cross-entropy of two-pass methods is the mean of both passes."""
    losses, accuracies = area.subplots(1, 2)
    for number, key in enumerate(keys):
        runs = [outcome for outcome in outcomes if outcome.contender.key == key]
        epochs = [row["epoch"] for row in runs[0].rows]
        for axes, name in ((losses, "loss"), (accuracies, "train_accuracy")):
            values = np.mean([[row[name] for row in run.rows] for run in runs], axis=0)
            axes.plot(epochs, values, color=_colour(number), label=runs[0].contender.title, linewidth=1.4)
    losses.set(xlabel="epoch", yscale="log")
    losses.set_title("training loss, whole (two passes: with consistency and alignment)", fontsize=10)
    losses.legend(fontsize=7)
    accuracies.set(xlabel="epoch", ylabel="%")
    accuracies.set_title("training accuracy (random experts, with dropout)", fontsize=10)
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
