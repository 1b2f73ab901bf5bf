"""Many runs side by side, each in a process with one thread: on small models that is faster than sharing each run."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from mosa_kernels.data.splits import DataSplits
from mosa_kernels.train.comparison import Contender, Outcome, demo_splits, run_contender
from mosa_kernels.train.orphans import end_with_parent, ending_early
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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


Listener = Callable[[Step], None]


class StepReporter(Reporter):
    """Passes a run's steps on."""

    def __init__(self, task: int, send: Listener) -> None:
        self.task = task
        self.send = send
        self._updates = 0

    def start(self, updates: int, done: int) -> None:
        self._updates = updates
        self.send(Step(self.task, done, updates, float("nan"), float("nan"), float("nan")))

    def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
        self.send(Step(self.task, update, self._updates, loss, accuracy, images_per_second))


@functools.lru_cache(maxsize=4)
def data_of(seed: int) -> DataSplits:
    """The demo's data, drawn once a process."""
    return demo_splits(seed)


def run_task(number: int, task: Task, send: Listener) -> Outcome:
    """One run in this process."""
    splits = data_of(task.settings.data_seed)
    reporter = StepReporter(number, send)
    return run_contender(task.contender, task.settings, splits, test=task.test, reporter=reporter, keep_in=task.keep_in)


_news: Any = None


def _begin_worker(news: Any) -> None:
    global _news
    _news = news
    end_with_parent()
    torch.set_num_threads(1)


def _run_in_worker(number: int, task: Task) -> Outcome:
    return run_task(number, task, _news.put)


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    on_step: Listener = lambda step: None,
    on_done: Callable[[int, Outcome], None] = lambda number, outcome: None,
) -> list[Outcome]:
    """Runs all tasks and returns their outcomes in order; none depends on `workers`, up to rounding.

    Args:
        tasks: what to do.
        workers: processes; 1 runs everything in this one.
        on_step: hears of progress.
        on_done: hears of each task that is complete, by number.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if workers == 1:
        outcomes = []
        for number, task in enumerate(tasks):
            outcomes.append(run_task(number, task, on_step))
            on_done(number, outcomes[-1])
        return outcomes
    return _run_in_processes(tasks, workers, on_step, on_done)


def _run_in_processes(
    tasks: Sequence[Task], workers: int, on_step: Listener, on_done: Callable[[int, Outcome], None]
) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    found: dict[int, Outcome] = {}
    with (
        one_thread_each(),
        ProcessPoolExecutor(min(workers, len(tasks)), context, _begin_worker, (news,)) as pool,
    ):
        # The longest first, so that no worker is left alone with a long run at the end.
        order = sorted(range(len(tasks)), key=lambda number: -(tasks[number].settings.passes or 1))
        waiting: dict[Future[Outcome], int] = {pool.submit(_run_in_worker, n, tasks[n]): n for n in order}
        with ending_early(pool):
            while waiting:
                with suppress(queue.Empty):
                    on_step(news.get(timeout=0.2))
                for future in [future for future in waiting if future.done()]:
                    number = waiting.pop(future)
                    found[number] = future.result()
                    on_done(number, found[number])
    return [found[number] for number in range(len(tasks))]


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Has processes that start within the context compute with one thread each."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
