"""Worker processes that end with the process that started them, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Has this process, started by `multiprocessing`, end as soon as its parent is gone, be it killed.

    A pool ends its workers when it is left in order. A parent that SIGTERM or SIGKILL ends leaves them at their work.
    An interruption from the keyboard, which reaches them all, is the parent's business, see `ending_early`.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


@contextmanager
def ending_early(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Has an error begin nothing more in a pool, and an interruption end what runs: the pool would wait for it."""
    try:
        yield
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            for child in multiprocessing.active_children():
                child.terminate()
        raise
