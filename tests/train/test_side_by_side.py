"""Runs side by side: what they tell is heard, an error ends them all, and each has its GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mosa_kernels.train import side_by_side
from mosa_kernels.train.side_by_side import run_side_by_side, tell


def talk(number: int) -> tuple[int, int, str | None]:
    for word in range(3):
        tell((number, word))
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_runs_tell_is_heard_in_order(workers: int) -> None:
    heard: dict[int, list[int]] = {0: [], 1: []}
    done = {}
    run_side_by_side([0, 1], talk, workers, done.__setitem__, lambda news: heard[news[0]].append(news[1]))
    assert done.keys() == {0, 1}
    for words in heard.values():  # a pool may lose the last news
        assert words == list(range(3))[: len(words)]
        assert words or workers > 1
    if workers == 1:
        assert heard == {0: [0, 1, 2], 1: [0, 1, 2]}
        assert {process for process, _, _ in done.values()} == {os.getpid()}
    else:
        assert os.getpid() not in {process for process, _, _ in done.values()}
        assert {threads for _, threads, _ in done.values()} == {1}
        assert {variable for _, _, variable in done.values()} == {"1"}


def test_nobody_hears_what_is_told_outside() -> None:
    heard: list[int] = []
    run_side_by_side([7], tell, 1, lambda *_: None, heard.append)
    tell(8)
    assert heard == [7]


FAILING = """
import sys, time
from pathlib import Path
from mosa_kernels.train.side_by_side import run_side_by_side, tell

def work(number):
    if number == 1:
        Path(sys.argv[1]).touch()
        for _ in range(2000):
            tell("much to tell " * 100)
            time.sleep(0.001)
    while not Path(sys.argv[1]).exists():
        time.sleep(0.01)
    raise ArithmeticError("the first fails")

if __name__ == "__main__":
    run_side_by_side([0, 1], work, 2, lambda *_: None)
"""


def test_an_error_ends_all_even_those_that_have_much_left_to_tell(tmp_path: Path) -> None:
    """A process that has put more into its queue than a pipe holds waits to be read before it ends."""
    script = tmp_path / "parent.py"
    script.write_text(FAILING)
    words = [sys.executable, str(script), str(tmp_path / "begun")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            errors = parent.communicate(timeout=180)[1]
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == 1
    assert errors.rstrip().endswith("ArithmeticError: the first fails")


def test_processes_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [side_by_side._visible(number) for number in range(2)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3ac")
    assert [side_by_side._visible(number) for number in range(2)] == ["5", "GPU-3ac"]
