"""No worker outlives the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mosa_kernels.train.orphans import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that has ended stands in the table until somebody asks how.
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_killed_parent(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert runs(worker)
        parent.send_signal(how)
        parent.wait()
        deadline = time.monotonic() + 30
        while runs(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = runs(worker)
        if left:
            os.kill(worker, signal.SIGKILL)
        assert not left


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
from mosa_kernels.train.side_by_side import run_side_by_side

def work(number):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background ignores it
    run_side_by_side(list(range(8)), work, 2, lambda *_: None)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_does_not_wait_for_what_runs(tmp_path: Path) -> None:
    """Ctrl-C of a terminal goes to the parent and its workers, whose runs may take hours."""
    script, begun = tmp_path / "parent.py", tmp_path / "begun"
    script.write_text(INTERRUPTED)
    begun.mkdir()
    words = [sys.executable, str(script), str(begun)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        deadline = time.monotonic() + 240
        while len(list(begun.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(parent.pid, signal.SIGINT)
        try:
            errors = parent.communicate(timeout=60)[1]
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
    assert errors.count("Traceback") == 1  # the parent's
    assert "KeyboardInterrupt" in errors
    assert len(list(begun.iterdir())) == 2
