"""The grid behind a table: runs that choose each row's numbers on validation images, then runs that test once a seed.

The seeds of the two kinds of runs are apart, so that what was chosen owes nothing to the seeds that are reported.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosa_kernels.train.methods import Numbers, number_words
from mosa_kernels.train.recipe import Recipe
from mosa_kernels.train.table_cells import Cell, accuracy_of, find_result, mechanisms_for
from mosa_kernels.train.table_spec import Changes, Row, Table, Task, candidates, cell_settings, tuned_row

FIRST_TUNING_SEED = 100


@dataclass(frozen=True)
class Grid:
    """A table's runs.

    Attributes:
        table: what is wanted.
        changes: to the whole grid.
        seeds, tuning_seeds: how many of the runs that are reported, and of those that choose.
    """

    table: Table
    changes: Changes
    seeds: int = 3
    tuning_seeds: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= FIRST_TUNING_SEED:
            raise ValueError(f"seeds: expected 1 to {FIRST_TUNING_SEED}, got {self.seeds}")
        if self.tuning_seeds < 1:
            raise ValueError(f"tuning_seeds: expected at least 1, got {self.tuning_seeds}")

    def tuning_tasks(self, task: Task) -> list[Task]:
        """The tasks whose validation images choose for this one: the one whose choice it takes over, or itself where
        that is not in the table; with one recipe for all, those of every task, each once."""
        known = {other.name: other for other in self.table.tasks}
        served = self.table.tasks if self.table.one_recipe else (task,)
        found = [known.get(each.tuned_on, each) for each in served]
        return list({each.name: each for each in found}.values())

    def tuning_cells(self, row: Row, task: Task) -> list[list[Cell]]:
        """For each of the row's candidates, the runs that speak for it."""
        row, seeds = tuned_row(row), range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds)
        return [
            [self._cell(row, each, numbers, seed, tuning=True) for each in self.tuning_tasks(task) for seed in seeds]
            for numbers in candidates(self.table, row)
        ]

    def row_tuning_cells(self, row: Row) -> list[Cell]:
        """The runs that choose for a row on any task; with one recipe, those of the first task are those of all."""
        tasks = self.table.tasks[:1] if self.table.one_recipe else self.table.tasks
        return [cell for task in tasks for group in self.tuning_cells(row, task) for cell in group]

    def all_tuning_cells(self) -> list[Cell]:
        return [cell for row in self.table.rows for cell in self.row_tuning_cells(row)]

    def choose(self, row: Row, task: Task, folder: Path) -> Choice:
        """The candidate of the highest mean validation accuracy, the first of equals; a run that failed counts as 0."""
        numbers = candidates(self.table, tuned_row(row))
        means = []
        for group in self.tuning_cells(row, task):
            results = [find_result(cell, folder) for cell in group]
            means.append(statistics.fmean((accuracy_of(result) or 0.0) if result else 0.0 for result in results))
        best = max(range(len(numbers)), key=means.__getitem__)
        return Choice(numbers[best], means[best], _edges(numbers, best))

    def choices(self, row: Row, folder: Path) -> list[tuple[Task, Choice]]:
        """What was chosen for a row on each task; with one recipe it is looked up once."""
        tasks = self.table.tasks
        if self.table.one_recipe:
            one = self.choose(row, tasks[0], folder)
            return [(task, one) for task in tasks]
        return [(task, self.choose(row, task, folder)) for task in tasks]

    def final_cells(self, row: Row, task: Task, choice: Choice) -> list[Cell]:
        """The runs that are reported, a run a seed."""
        return [self._cell(row, task, choice.numbers, seed, tuning=False) for seed in range(self.seeds)]

    def possible_cells(self) -> Iterator[Cell]:
        """Every run that the table may rest on, whatever validation chooses."""
        for row in self.table.rows:
            yield from self.row_tuning_cells(row)
            for task in self.table.tasks:
                for numbers in candidates(self.table, tuned_row(row)):
                    yield from self.final_cells(row, task, Choice(numbers, 0.0, ()))

    def _cell(self, row: Row, task: Task, numbers: Numbers, seed: int, *, tuning: bool) -> Cell:
        settings = cell_settings(self.table, row, task, numbers, seed, self.changes, tuning=tuning)
        what = " ".join(itertools.starmap(number_words, numbers.items()))
        style = row.adapter.get("style", "")
        label = " ".join(
            filter(None, ("tune" if tuning else "test", row.variant, style, task.name, what, f"seed {seed}"))
        )
        return Cell(
            label, settings, test=not tuning, mechanisms=("merged",) if tuning else mechanisms_for(row.mechanism)
        )


@dataclass(frozen=True)
class Choice:
    """What validation chose.

    Attributes:
        numbers: learning rate, and dropout where it was tuned.
        validation: mean validation accuracy, percent.
        at_edge: names of numbers chosen at the end of their grid, so that more of it may be better.
    """

    numbers: Numbers
    validation: float
    at_edge: tuple[str, ...]


def _edges(grid: list[Numbers], best: int) -> tuple[str, ...]:
    found = []
    for name, value in grid[best].items():
        values: set[Any] = {numbers[name] for numbers in grid}  # of one kind
        if len(values) > 1 and value in (min(values), max(values)):
            found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class Measured:
    """A row on a task.

    Attributes:
        accuracies: test accuracy (percent) by seed; None of a run that failed.
        choice: what it was trained with.
        parameters: trainable ones without head and further expert biases.
        seconds: of a run, on average.
    """

    accuracies: tuple[float | None, ...]
    choice: Choice
    parameters: int
    seconds: float


def all_final_cells(grid: Grid, folder: Path) -> list[Cell]:
    """The reported runs; the runs that choose have to be done."""
    return [
        cell
        for row in grid.table.rows
        for task, choice in grid.choices(row, folder)
        for cell in grid.final_cells(row, task, choice)
    ]


def count_cells(grids: Sequence[Grid]) -> tuple[int, int]:
    """How many different runs choose, and at most how many test, done ones included."""
    tuning = {cell.identity for grid in grids for cell in grid.all_tuning_cells()}
    final: set[str] = set()
    for grid in grids:
        for row in grid.table.rows:
            for task in grid.table.tasks:
                first = Choice(candidates(grid.table, tuned_row(row))[0], 0.0, ())
                final |= {cell.identity for cell in grid.final_cells(row, task, first)}
    return len(tuning), len(final)


def collect(grid: Grid, folder: Path) -> dict[str, dict[str, Measured]]:
    """What was measured, by row key and task name.

    Raises:
        ValueError: a run is missing.
    """
    found: dict[str, dict[str, Measured]] = {}
    for row in grid.table.rows:
        for task, choice in grid.choices(row, folder):
            results = [_result(cell, folder) for cell in grid.final_cells(row, task, choice)]
            found.setdefault(row.key, {})[task.name] = Measured(
                accuracies=tuple(accuracy_of(result, row.mechanism) for result in results),
                choice=choice,
                parameters=results[0]["parameters"]["adapter"],
                seconds=statistics.fmean(result["seconds"] for result in results),
            )
    return found


def _result(cell: Cell, folder: Path) -> dict[str, Any]:
    result = find_result(cell, folder)
    if result is None:
        raise ValueError(f"{folder}: the run {cell.label!r} is missing; run the table again to complete it")
    return result


def made_by(grid: Grid, folder: Path) -> dict[str, Any]:
    """On which machines and with which versions the runs behind a table were made, whichever commands made them; how
    many they are, and their seconds in all."""
    cells = {cell.identity: cell for cell in [*grid.all_tuning_cells(), *all_final_cells(grid, folder)]}
    results = [_result(cell, folder) for cell in cells.values()]
    packages = dict.fromkeys(package for result in results for package in result["versions"])
    return {
        "machine": _each(map(_place, results)),
        "versions": {name: _each(result["versions"].get(name, "unknown") for result in results) for name in packages},
        "runs_behind_the_table": len(results),
        "seconds_of_these_runs_added_up": round(sum(result["seconds"] for result in results)),
    }


def _place(result: dict[str, Any]) -> str:
    device = result["device"]
    return str(result["machine"] if device == "cpu" else f"{device} in {result['machine']}")


def _each(names: Iterable[str]) -> str:
    """The different names and, where there are several, how many runs have each."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{name} ({count} run{'s' if count > 1 else ''})" for name, count in counts.items())


def recipe_of(grid: Grid) -> Recipe:
    """The recipe of the first cell, to be printed."""
    table = grid.table
    numbers = candidates(table, tuned_row(table.rows[0]))[0]
    return cell_settings(table, table.rows[0], table.tasks[0], numbers, 0, grid.changes, tuning=False).recipe
