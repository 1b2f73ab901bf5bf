"""Two processes on one machine, by gloo: the batch is divided, one folder is written, and a resume finds every part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosa_kernels.train import job as job_module
from mosa_kernels.train.folder import SettingsDifferError
from mosa_kernels.train.job import Job
from mosa_kernels.train.progress import Reporter

PROGRAM = """
import json, sys
from pathlib import Path
from mosa_kernels.train.folder import SettingsDifferError
from mosa_kernels.train.job import Job
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings
Job(Settings.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "resume", Reporter()).run()
"""


def launch(settings: Any, output: Path, resume: bool = False) -> None:
    """Starts both processes as torchrun does, and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(settings.as_dict()),
        str(output),
        "resume" if resume else "new",
    ]
    common = {
        **os.environ,
        "PYTHONPATH": str(Path(job_module.__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(arguments, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_train_like_one(tiny: Any, tmp_path: Path):
    """A linear probe without augmentation sees the same images either way, but for the padding of the last batch."""
    settings = tiny(method="linear", augment="none", batch_size=2, epochs=2, lr=0.005)
    launch(settings, tmp_path / "two")
    Job(settings, tmp_path / "one", False, Reporter()).run()
    rows = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert [row["epoch"] for row in rows["two"]] == [1, 2]
    for one, two in zip(rows["one"], rows["two"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.1)
        assert two["validation_nll"] == pytest.approx(one["validation_nll"], rel=0.1)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    kept = sorted(path.name for path in (tmp_path / "two" / "state" / "epoch-0002").glob("*.json"))
    assert kept == ["process-0.state.json", "process-1.state.json", "run.state.json"]

    result = tmp_path / "two" / "result.json"
    tested = json.loads(result.read_text())["test"]
    result.unlink()
    with pytest.raises(SettingsDifferError, match="processes: the run has 2, now 1"):
        Job(settings, tmp_path / "two", True, Reporter())
    launch(settings, tmp_path / "two", resume=True)
    assert json.loads(result.read_text())["test"] == tested
