"""Many cells side by side: a process a GPU, or single-threaded processes on the CPU; what is done is not done again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from mosa_kernels._machine import available_cores
from mosa_kernels.train.comparison_runs import one_thread_each
from mosa_kernels.train.orphans import end_with_parent, ending_early
from mosa_kernels.train.table_cells import Cell, find_result, run_and_keep

OnDone = Callable[[Cell, dict[str, Any]], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


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


def run_side_by_side(
    items: Sequence[Item], run: Callable[[Item], Result], workers: int, on_done: Callable[[Item, Result], None]
) -> None:
    """Runs a function on each item, in processes that have a GPU each or compute with one thread, and end with this.

    Args:
        items: what to do, begun in this order.
        run: a function that other processes can import, and what it returns they can send.
        workers: processes; 1 runs everything in this one, with the threads that it has.
        on_done: hears of each item that is complete.

    Raises:
        ValueError: fewer than one worker.
        BrokenProcessPool: a process was ended from outside.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if workers == 1 or len(items) <= 1:
        for item in items:
            on_done(item, run(item))
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(min(workers, len(items))):
        numbers.put(number)
    gpus = torch.cuda.device_count()
    with (
        one_thread_each(),
        ProcessPoolExecutor(min(workers, len(items)), context, _begin_worker, (numbers, gpus)) as pool,
    ):
        waiting: dict[Future[Result], Item] = {pool.submit(run, item): item for item in items}
        with ending_early(pool):
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    on_done(waiting.pop(future), future.result())


def _begin_worker(numbers: Any, gpus: int) -> None:
    """Gives a process its GPU before it looks for one; several processes may share one."""
    end_with_parent()
    number = numbers.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(number % gpus)
    else:
        torch.set_num_threads(1)


def _visible(number: int) -> str:
    """The name of GPU `number` among those that this process may see."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[number] if names else str(number)


def _length(cell: Cell) -> int:
    """How long a cell takes, roughly: images through the network."""
    recipe = cell.settings.recipe
    return recipe.epochs * recipe.batch_size * (cell.settings.passes or 1)
