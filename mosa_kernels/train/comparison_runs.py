"""The runs of the demo's comparison, side by side, with news of every step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mosa_kernels.data.splits import DataSplits
from mosa_kernels.train.comparison import Contender, Outcome, demo_splits, run_contender
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.side_by_side import run_side_by_side, tell


@dataclass(frozen=True)
class Task:
    """One run: what `run_contender` takes, and the folder where its merged weights go, if anywhere."""

    contender: Contender
    settings: Settings
    test: bool
    keep_in: str | None = None


@dataclass(frozen=True)
class Step:
    """News from a run: updates done of all, loss and training accuracy (percent) of the epoch so far."""

    task: int
    update: int
    updates: int
    loss: float
    accuracy: float
    images_per_second: float


class StepReporter(Reporter):
    """Passes a run's steps on."""

    def __init__(self, task: int) -> None:
        self.task = task
        self._updates = 0

    def start(self, updates: int, done: int) -> None:
        self._updates = updates
        tell(Step(self.task, done, updates, float("nan"), float("nan"), float("nan")))

    def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
        tell(Step(self.task, update, self._updates, loss, accuracy, images_per_second))


@functools.lru_cache(maxsize=4)
def data_of(seed: int) -> DataSplits:
    """The demo's data, drawn once a process."""
    return demo_splits(seed)


def run_task(numbered: tuple[int, Task]) -> Outcome:
    """One run in this process, which tells its steps under its number."""
    number, task = numbered
    splits = data_of(task.settings.data_seed)
    reporter = StepReporter(number)
    return run_contender(task.contender, task.settings, splits, test=task.test, reporter=reporter, keep_in=task.keep_in)


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    on_step: Callable[[Step], None] = lambda step: None,
    on_done: Callable[[int, Outcome], None] = lambda number, outcome: None,
) -> list[Outcome]:
    """Runs all tasks and returns their outcomes in order; none depends on `workers`, up to rounding.

    Args:
        tasks: what to do.
        workers: processes; 1 runs everything in this one.
        on_step: hears of progress.
        on_done: hears of each task that is complete, by number.
    """
    order = list(enumerate(tasks))
    if workers > 1:  # the longest first, so that no worker is left alone with a long run at the end
        order.sort(key=lambda numbered: -(numbered[1].settings.passes or 1))
    found: dict[int, Outcome] = {}

    def keep(numbered: tuple[int, Task], outcome: Outcome) -> None:
        found[numbered[0]] = outcome
        on_done(numbered[0], outcome)

    run_side_by_side(order, run_task, workers, keep, on_step)
    return [found[number] for number in range(len(tasks))]
