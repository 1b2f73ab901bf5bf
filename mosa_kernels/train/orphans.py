"""Worker processes that end with the process that started them, however that one ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """Has this process, started by `multiprocessing`, end as soon as its parent is gone, be it killed.

    A pool ends its workers when it is left in order. A parent that SIGTERM or SIGKILL ends leaves them at their work.
    An interruption from the keyboard, which reaches them all, is the parent's business, see `end_children`.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def end_children() -> None:
    """Ends the processes that this one started by `multiprocessing`; a pool would wait for what they are at."""
    for child in multiprocessing.active_children():
        child.terminate()
