"""Whole runs: what they leave behind, and that they go on exactly where they stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mosa_kernels.train import job as job_module
from mosa_kernels.train import loop as loop_module
from mosa_kernels.train.folder import RunExistsError, RunFolder, SettingsDifferError
from mosa_kernels.train.job import Job
from mosa_kernels.train.loop import NonFiniteError
from mosa_kernels.train.objective import Objective
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.saved import open_saved
from mosa_kernels.train.settings import Settings

TIMES = {"seconds", "images_per_second"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def result_of(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k not in TIMES}


def require_same_run(one: Path, other: Path) -> None:
    assert rows_of(one) == rows_of(other)
    assert result_of(one) == result_of(other)
    for which in ("best", "last"):
        ours, theirs = (load_file(run / "adapter" / which / "adapter_model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def run(settings: Settings, output: Path, resume: bool = False) -> dict[str, Any]:
    return Job(settings, output, resume, Reporter()).run()


@pytest.fixture
def whole(tiny: Any, tmp_path: Path) -> Path:
    """An uninterrupted run."""
    run(tiny(), tmp_path / "whole")
    return tmp_path / "whole"


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: type[BaseException]) -> None:
    """Has the loss raise at its n-th call."""
    calls = 0
    original = Objective.__call__

    def counted(self: Objective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(Objective, "__call__", counted)


def test_a_run_leaves_everything_behind(whole: Path, tiny: Any):
    config = json.loads((whole / "config.json").read_text())
    assert Settings.from_dict(config["settings"]) == tiny()
    assert config["data"]["train"] == 15
    assert len(config["data"]["fingerprint"]) == 64
    assert len(config["backbone"]["sha256"]) == 64
    assert {"mean", "std", "input_size"} <= config["normalisation"].keys()
    assert {"torch", "timm", "accelerate", "python", "mosa_kernels"} <= config["versions"].keys()
    rows = rows_of(whole)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for row in rows:
        parts = row["loss_cross_entropy"] + row["loss_consistency"] + row["loss_alignment"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    result = result_of(whole)
    assert result["test"].keys() == {"mean", "jigsaw", "stochastic"}
    assert result["accuracy"] == result["test"]["mean"]["accuracy"]
    assert {"selection", "seed", "parameters", "normalisation", "data_fingerprint", "versions"} <= result.keys()
    best = max(rows, key=lambda row: row["validation_accuracy"])  # the first of equals
    assert result["epoch"] == best["epoch"]
    assert result["validation"]["mean"]["accuracy"] == pytest.approx(best["validation_accuracy"])
    assert not [path for path in whole.rglob("*") if "partial" in path.name or path.suffix in (".pkl", ".pt", ".bin")]


def test_it_learns_the_pictures(tiny: Any, tmp_path: Path):
    result = run(tiny(epochs=6, dropout=0.0, augment="none"), tmp_path / "run")
    assert result["accuracy"] > 80  # of three shapes


def test_an_interrupted_run_goes_on_with_the_same_numbers(
    whole: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, 5, KeyboardInterrupt)  # the second of three updates in the second epoch
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), tmp_path / "cut")
    assert len(rows_of(tmp_path / "cut")) == 1
    torch.manual_seed(12345)  # a new process would start with other generators
    run(tiny(), tmp_path / "cut", resume=True)
    require_same_run(whole, tmp_path / "cut")


@pytest.mark.parametrize("method", ["linear", "adaptformer", "sparseadapter"])
def test_baselines_resume_exactly_too(method: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = tiny(method=method, epochs=2)
    run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, 5, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "cut")
    run(settings, tmp_path / "cut", resume=True)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "cut")
    assert result_of(tmp_path / "whole") == result_of(tmp_path / "cut")
    assert result_of(tmp_path / "cut")["reported"] == "plain"


@pytest.mark.parametrize("where", ["write_part", "publish"])
def test_a_crash_while_saving_loses_nothing_older(
    where: str, whole: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The metrics of epoch 2 are written, its state is not."""
    original = getattr(job_module.training_state, where)
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (2 if where == "publish" else 4):  # two parts an epoch
            raise OSError("disk full")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job_module.training_state, where, failing)
        with pytest.raises(OSError, match="disk full"):
            run(tiny(), tmp_path / "cut")
    assert len(rows_of(tmp_path / "cut")) == 2
    run(tiny(), tmp_path / "cut", resume=True)
    require_same_run(whole, tmp_path / "cut")


def test_a_crash_between_state_and_adapters_is_mended(
    whole: Path, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_save_adapters", lambda self: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run(tiny(), tmp_path / "cut")
    run(tiny(), tmp_path / "cut", resume=True)
    require_same_run(whole, tmp_path / "cut")


KILLED = """
import os, signal
from mosa_kernels.train.objective import Objective
calls, original = 0, Objective.__call__
def counted(self, *arguments):
    global calls
    calls += 1
    if calls == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
Objective.__call__ = counted
import json, sys
from pathlib import Path
from mosa_kernels.train.job import Job
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings
Job(Settings.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), False, Reporter()).run()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_kill_9_in_the_middle_of_an_epoch(whole: Path, tiny: Any, tmp_path: Path):
    cut = tmp_path / "cut"
    arguments = [sys.executable, "-c", KILLED, json.dumps(tiny().as_dict()), str(cut)]
    source = str(Path(job_module.__file__).parents[2])
    killed = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": source}, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(rows_of(cut)) == 2
    run(tiny(), cut, resume=True)
    require_same_run(whole, cut)


def test_other_settings_are_refused_by_name(whole: Path, tiny: Any):
    with pytest.raises(SettingsDifferError, match=r"recipe\.base_lr: the run has 0.02, now 0.01"):
        Job(tiny(lr=0.01), whole, True, Reporter())
    with pytest.raises(SettingsDifferError, match=r"method: the run has 'mosa', now 'adaptformer'"):
        Job(tiny(method="adaptformer", optimizer="mosa", passes=2), whole, True, Reporter())


def test_other_pictures_are_refused(whole: Path, pictures: Path, tiny: Any):
    extra = pictures / "train" / "disc" / "extra.png"
    extra.write_bytes((pictures / "train" / "disc" / "0.png").read_bytes())
    try:
        with pytest.raises(SettingsDifferError, match="other data than the run began with: fingerprint"):
            Job(tiny(), whole, True, Reporter())
    finally:
        extra.unlink()


def test_other_classes_are_refused_by_name(whole: Path, tiny: Any):
    config = json.loads((whole / "config.json").read_text())
    assert config["data"]["class_names"] == result_of(whole)["class_names"] == ["cross", "disc", "stripes"]
    config["data"]["class_names"] = ["cross", "ball", "stripes"]
    (whole / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SettingsDifferError, match="other classes than the run began with: label 1 was 'ball' and is 'disc'"
    ):
        Job(tiny(), whole, True, Reporter())


def test_a_folder_in_use_is_refused(whole: Path, tiny: Any, tmp_path: Path):
    with pytest.raises(RunExistsError, match="it holds a run; go on with --resume"):
        Job(tiny(), whole, False, Reporter())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(RunExistsError, match="expected a new or empty folder"):
        Job(tiny(), tmp_path / "mine", False, Reporter())
    with pytest.raises(RunExistsError, match=r"notes\.txt: expected a new or empty folder"):
        RunFolder(tmp_path / "mine" / "notes.txt").require_new()
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        Job(tiny(), tmp_path / "nothing", True, Reporter())


def test_a_run_that_was_killed_before_it_began_may_begin(tiny: Any, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.ab12_.partial").write_text('{"settings"')
    (folder / ".lock").touch()
    run(tiny(epochs=1, method="linear"), folder)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.txt.ab12_.partial").write_text("mine")
    with pytest.raises(RunExistsError, match="expected a new or empty folder"):
        Job(tiny(), tmp_path / "mine", False, Reporter())


LOCKING = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fcntl")
def test_two_processes_do_not_work_on_one_run(tiny: Any, tmp_path: Path):
    folder = tmp_path / "run"
    begun = Job(tiny(), folder, False, Reporter())
    arguments = [sys.executable, "-c", LOCKING, str(folder / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        for work in (lambda: Job(tiny(), folder, True, Reporter()), begun.run):
            with pytest.raises(RunExistsError, match="another process is at work on this run"):
                work()
        other.kill()
    assert not (folder / "metrics.jsonl").exists()
    run(tiny(), folder, resume=True)
    assert len(rows_of(folder)) == 3


def test_a_finished_run_is_not_tested_again(whole: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch):
    before = result_of(whole)
    monkeypatch.setattr(job_module, "evaluate", None)  # test images are touched once
    after = Job(tiny(), whole, True, Reporter()).run()
    assert {key: value for key, value in after.items() if key not in TIMES} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = Objective.__call__
    calls = 0

    def poisoned(self: Objective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        parts, logits = original(self, *arguments)
        return ({**parts, "loss": parts["loss"] * float("nan")} if calls == 5 else parts), logits

    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(NonFiniteError, match=r"the loss is nan in epoch 2.*try a lower learning rate \(now 0.02\)"):
        run(tiny(), tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["epoch-0001"]
    kept = open_saved(tmp_path / "run").model
    assert all(bool(torch.isfinite(p).all()) for p in kept.parameters())


def test_the_loss_is_told_and_looked_at_within_an_epoch(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[tuple[int, int, float, float]] = []

    class Listening(Reporter):
        def step(self, epoch: int, update: int, loss: float, accuracy: float, images_per_second: float) -> None:
            assert images_per_second > 0
            steps.append((epoch, update, loss, accuracy))

    monkeypatch.setattr(loop_module, "CHECK_EVERY", 2)
    Job(tiny(epochs=2), tmp_path / "run", False, Listening()).run()  # three updates an epoch
    assert [step[:2] for step in steps] == [(0, 2), (0, 3), (1, 5), (1, 6)]
    for row, (_, _, loss, accuracy) in zip(rows_of(tmp_path / "run"), steps[1::2], strict=True):
        assert (loss, accuracy) == pytest.approx((row["loss"], row["train_accuracy"]))
        parts = [row[f"loss_{name}"] for name in ("cross_entropy", "consistency", "alignment")]
        assert sum(parts) == pytest.approx(loss)  # alpha = beta = 1
    assert steps[0][2:] != steps[1][2:]


def test_outputs_that_are_not_finite_are_no_result(tiny: Any, tmp_path: Path):
    """Weights may be finite and what comes of them not, whose argmax is the first class."""
    settings = tiny(epochs=2, lr=1e30, warmup_epochs=0.0, batch_size=64)  # one update an epoch
    with pytest.raises(NonFiniteError, match=r"outputs for validation images are not finite after epoch 1: try a"):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_damaged_result_is_made_again(whole: Path, tiny: Any, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "result.json").write_text("")
    run(tiny(), tmp_path / "copy", resume=True)
    assert result_of(tmp_path / "copy") == result_of(whole)


def test_a_curve_that_was_not_drawn_is_drawn_on_resuming(whole: Path, tiny: Any):
    """As of a run that is killed after its last epoch."""
    for name in ("curve.png", "result.json"):
        (whole / name).unlink()
    run(tiny(), whole, resume=True)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    (whole / "result.json").unlink()
    (whole / "curve.png").write_bytes(b"of fewer epochs")
    run(tiny(), whole, resume=True)
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_ends_a_run_is_not_hidden_by_the_picture(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(where: str) -> Callable[..., None]:
        def fail(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)

        return fail

    monkeypatch.setattr(job_module.training_state, "write_part", full("state"))
    monkeypatch.setattr(job_module, "plot_curve", full("curve.png"))
    with pytest.raises(OSError, match=r"No space left on device: 'state'"):
        run(tiny(epochs=1, method="linear"), tmp_path / "run")


@pytest.mark.parametrize(("batch_size", "accumulate"), [(10, 2), (8, 2), (8, 4)])
def test_accumulated_batches_make_the_updates_of_whole_ones(
    batch_size: int, accumulate: int, tiny: Any, tmp_path: Path
):
    """A loss without experts and dropout is a mean over images, so parts of a batch add up to it.

    Of 15 images the last update has fewer batches than the others, or batches of two sizes; the large eps has a step
    grow with its gradient.
    """
    options = {"method": "adaptformer", "dropout": 0.0, "batch_size": batch_size, "epochs": 2, "eps": 1.0}
    run(tiny(**options), tmp_path / "whole")
    run(tiny(**options, accumulate=accumulate), tmp_path / "parts")
    for one, other in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"), strict=True):
        assert one["lr"] == pytest.approx(other["lr"])
    whole, parts = (
        load_file(tmp_path / name / "adapter" / "last" / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert whole["head.head.bias"].abs().max() > 1e-4
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-4, atol=1e-6)
