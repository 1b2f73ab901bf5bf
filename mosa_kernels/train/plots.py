"""The curve of a run, as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mosa_kernels._files import write_whole


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure under a temporary name and renames it."""
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=dpi))


def plot_curve(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss with its parts, accuracy, and learning rate over the epochs; nothing where there is no epoch yet."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display needed

    if not rows:
        return
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 30 else ""
    figure = Figure(figsize=(11, 3.6))
    figure.subplots_adjust(left=0.05, right=0.98, top=0.82, bottom=0.14, wspace=0.22)
    losses, accuracies, rates = figure.subplots(1, 3)
    parts = [name for name in rows[0] if name == "loss" or name.startswith("loss_")]
    for name in parts:
        label = "total" if name == "loss" else name.removeprefix("loss_").replace("_", " ")
        losses.plot(epochs, [row[name] for row in rows], marker=marker, markersize=3, label=label)
    losses.set(title="training loss", xlabel="epoch", yscale="log" if _spread(rows, parts) else "linear")
    losses.legend(fontsize=8)
    for name, label in (("train_accuracy", "training"), ("validation_accuracy", "validation")):
        accuracies.plot(epochs, [row[name] for row in rows], marker=marker, markersize=3, label=label)
    accuracies.set(title="accuracy (%)", xlabel="epoch")
    accuracies.legend(fontsize=8)
    rates.plot(epochs, [row["lr"] for row in rows], color="grey")
    rates.set(title="learning rate", xlabel="epoch")
    for axes in (losses, accuracies, rates):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _spread(rows: list[dict[str, Any]], parts: list[str]) -> bool:
    """Whether the parts of the loss differ so much that only a logarithmic axis shows them."""
    values = [row[name] for row in rows for name in parts if row[name] is not None and row[name] > 0]
    return bool(values) and max(values) > 100 * min(values)
