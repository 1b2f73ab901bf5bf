"""Draws docs/method.png, the README's picture of MoSA: split, train one expert at a time, merge."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import mosa_kernels as mk

COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44")
PALE = "#F2F2F2"
ROWS, COLUMNS = 12, 6


def _matrix(ax: Axes, left: float, bottom: float, colors: np.ndarray, cell: float = 0.13) -> None:
    for row in range(ROWS):
        for column in range(COLUMNS):
            corner = (left + column * cell, bottom + (ROWS - 1 - row) * cell)
            ax.add_patch(plt.Rectangle(corner, cell, cell, facecolor=colors[row, column], edgecolor="white", lw=0.8))


def _box(ax: Axes, left: float, bottom: float, width: float, height: float, text: str, color: str = "#DDE6F0") -> None:
    ax.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#444444")
    )
    ax.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#444444", **style))


def main(path: Path) -> None:
    owner = mk.split((ROWS, COLUMNS), 4, generator=torch.Generator().manual_seed(4)).numpy()
    every = np.array(COLORS, dtype=object)[owner]
    figure, ax = plt.subplots(figsize=(11, 3.9))
    ax.set_xlim(0, 11)
    ax.set_ylim(0, 3.9)
    ax.axis("off")

    ax.text(1.3, 3.68, "1. Split", ha="center", fontsize=12, weight="bold")
    _matrix(ax, 0.9, 1.6, every)
    ax.text(1.3, 1.42, "up-projection [d, r]", ha="center", va="top", fontsize=9)
    ax.text(
        1.3,
        1.1,
        "one copy, one byte per entry:\nits owner among N experts",
        ha="center",
        va="top",
        fontsize=9,
        color="#444444",
    )

    ax.text(5.3, 3.68, "2. Train: each forward pass draws one expert", ha="center", fontsize=12, weight="bold")
    _box(ax, 2.75, 2.15, 0.75, 0.45, "tokens\nx")
    _box(ax, 3.85, 2.15, 0.95, 0.45, "LayerNorm\n+ down")
    _box(ax, 5.15, 2.15, 0.7, 0.45, "GELU")
    _arrow(ax, (3.53, 2.37), (3.82, 2.37))
    _arrow(ax, (4.83, 2.37), (5.12, 2.37))
    _arrow(ax, (5.88, 2.37), (6.35, 2.37))
    _matrix(ax, 6.4, 1.6, np.where(owner == 1, COLORS[1], PALE))
    _box(ax, 7.6, 2.15, 0.35, 0.45, "+")
    _arrow(ax, (7.2, 2.37), (7.57, 2.37))
    _arrow(ax, (3.12, 2.63), (7.77, 2.63), connectionstyle="arc3,rad=-0.34")
    ax.add_patch(
        FancyBboxPatch(
            (2.6, 1.38), 5.5, 2.12, boxstyle="round,pad=0.03", fill=False, edgecolor="#777777", linestyle="--"
        )
    )
    ax.text(
        5.35,
        1.25,
        "one fused call; in the up-projection\nonly the drawn expert's entries get gradients",
        ha="center",
        va="top",
        fontsize=9,
    )
    for number in range(4):
        drawn = number == 1
        ax.add_patch(
            plt.Circle((4.65 + 0.45 * number, 0.55), 0.15, facecolor=COLORS[number], alpha=1.0 if drawn else 0.3, lw=0)
        )
    ax.text(5.33, 0.28, "drawn anew for every sample", ha="center", va="top", fontsize=9, color="#444444")

    ax.text(9.75, 3.68, "3. Merge", ha="center", fontsize=12, weight="bold")
    _matrix(ax, 9.35, 1.6, every)
    _arrow(ax, (8.35, 2.37), (9.2, 2.37))
    ax.text(9.75, 1.42, "a plain dense adapter", ha="center", va="top", fontsize=9)
    ax.text(
        9.75,
        1.1,
        "norm and scale folded in:\ninference costs what a\nstandard adapter costs",
        ha="center",
        va="top",
        fontsize=9,
        color="#444444",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "method.png")
