"""Runs in processes of one thread each, or of a GPU each: on small models that is faster than sharing each run."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from mosa_kernels.train.orphans import end_with_parent, ending_early

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PATIENCE = 0.2  # seconds between two looks at what is complete, while there is no news

Item = TypeVar("Item")
Result = TypeVar("Result")
Listener = Callable[[Any], None]


def _ignore(news: Any) -> None:
    """Nobody listens."""


_listener: Listener = _ignore


def tell(news: Any) -> None:
    """Passes news of a run on, from wherever it runs, to who listens to `run_side_by_side`."""
    _listener(news)


def run_side_by_side(
    items: Sequence[Item],
    run: Callable[[Item], Result],
    workers: int,
    on_done: Callable[[Item, Result], None],
    on_news: Listener = _ignore,
) -> None:
    """Runs a function on each item, in processes that have a GPU each or compute with one thread, and end with this.

    Args:
        items: what to do, begun in this order.
        run: a function that other processes can import, and what it returns they can send.
        workers: processes; 1 runs everything in this one, with the threads that it has.
        on_done: hears of each item that is complete.
        on_news: hears what runs `tell`; the last news of a run may be lost.

    Raises:
        ValueError: fewer than one worker.
        BrokenProcessPool: a process was ended from outside.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if workers == 1 or len(items) <= 1:
        with _heard_by(on_news):
            for item in items:
                on_done(item, run(item))
        return
    context = multiprocessing.get_context("spawn")
    numbers, news = context.Queue(), context.Queue()
    for number in range(min(workers, len(items))):
        numbers.put(number)
    gpus = torch.cuda.device_count()
    with (
        _one_thread_each(),
        ProcessPoolExecutor(min(workers, len(items)), context, _begin_worker, (numbers, gpus, news)) as pool,
    ):
        waiting: dict[Future[Result], Item] = {pool.submit(run, item): item for item in items}
        with ending_early(pool):
            while waiting:
                with suppress(queue.Empty):
                    on_news(news.get(timeout=PATIENCE))
                for future in [future for future in waiting if future.done()]:
                    on_done(waiting.pop(future), future.result())


def _begin_worker(numbers: Any, gpus: int, news: Any) -> None:
    """Gives a process its GPU before it looks for one; several processes may share one."""
    global _listener
    end_with_parent()
    _listener = news.put
    news.cancel_join_thread()  # after an error nobody reads any more: a worker that waited to be read would not end
    number = numbers.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(number % gpus)
    else:
        torch.set_num_threads(1)


def _visible(number: int) -> str:
    """The name of GPU `number` among those that this process may see."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names[number] if names else str(number)


@contextmanager
def _heard_by(listener: Listener) -> Iterator[None]:
    """Has a listener hear what runs in this process tell."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextmanager
def _one_thread_each() -> Iterator[None]:
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
