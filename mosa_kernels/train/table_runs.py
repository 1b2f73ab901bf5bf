"""Many cells side by side: a process a GPU, or single-threaded processes on the CPU; what is done is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mosa_kernels._machine import available_cores
from mosa_kernels.train.side_by_side import run_side_by_side
from mosa_kernels.train.table_cells import Cell, find_result, run_and_keep

OnDone = Callable[[Cell, dict[str, Any]], None]


def usual_workers() -> int:
    """A process a GPU; without one, a process a core, at most 16."""
    return torch.cuda.device_count() or min(available_cores(), 16)


def missing_cells(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """The cells that are not done yet, each once, in order; of a cell that is wanted twice, all its mechanisms."""
    wanted: dict[str, Cell] = {}
    for cell in cells:
        known = wanted.setdefault(cell.identity, cell)
        if set(cell.mechanisms) - set(known.mechanisms):
            every = tuple(dict.fromkeys((*known.mechanisms, *cell.mechanisms)))
            wanted[cell.identity] = Cell(known.label, known.settings, known.test, every)
    return [cell for cell in wanted.values() if find_result(cell, folder) is None]


def run_cells(cells: Sequence[Cell], folder: Path, workers: int, on_done: OnDone = lambda cell, result: None) -> None:
    """Runs the cells that are not done yet and writes a file for each; an interruption costs the cells in flight.

    Args:
        cells: what to run.
        folder: of the files.
        workers: processes; 1 runs everything in this one.
        on_done: hears of each cell that is complete.

    Raises:
        ValueError: fewer than one worker, or what is wrong with a cell's settings or data.
        BrokenProcessPool: a process was ended from outside.
    """
    todo = missing_cells(cells, folder)
    if workers > 1:  # the longest first, so that no worker is left alone with a long run at the end
        todo = sorted(todo, key=_length, reverse=True)
    run_side_by_side(todo, partial(run_and_keep, folder=folder), workers, on_done)


def _length(cell: Cell) -> int:
    """How long a cell takes, roughly: images through the network."""
    recipe = cell.settings.recipe
    return recipe.epochs * recipe.batch_size * (cell.settings.passes or 1)
