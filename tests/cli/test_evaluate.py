"""`mosa-kernels evaluate`: every mechanism, from a run or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_all_mechanisms_of_a_run(trained: tuple[Path, str], command: Any, tmp_path: Path):
    folder, _ = trained
    result = command("evaluate", folder, "--inference", "all", "--cpu", "--output", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["results"]) == {"mean", "jigsaw", "stochastic", "fixed", "fixed 0", "fixed 1", "ensemble"}
    recorded = json.loads((folder / "result.json").read_text())["test"]
    for rule in ("mean", "jigsaw"):
        assert found["results"][rule] == pytest.approx(recorded[rule])
    assert "merged by mean (as configured)" in result.stdout


def test_a_merged_accuracy_never_stands_alone(trained: tuple[Path, str], command: Any):
    result = command(
        "evaluate", trained[0], "--inference", "merged", "--rule", "mean", "--split", "validation", "--cpu"
    )
    assert result.exit_code == 0, result.output
    assert "stochastic" in result.stdout


def test_an_adapter_on_its_own(trained: tuple[Path, str], command: Any, pictures: Path, tmp_path: Path):
    alone = tmp_path / "adapter"
    alone.mkdir()
    for path in (trained[0] / "adapter" / "last").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    result = command("evaluate", alone, "--cpu")
    assert result.exit_code == 1
    assert "does not say what it was trained on; give --data" in result.stderr
    result = command("evaluate", alone, "--data", pictures, "--cpu", "--output", tmp_path / "alone.json")
    assert result.exit_code == 0, result.output
    command("evaluate", trained[0], "--weights", "last", "--cpu", "--output", tmp_path / "run.json")
    alone_found, run_found = (
        json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("alone", "run")
    )
    assert alone_found["mean"]["nll"] == pytest.approx(run_found["mean"]["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--inference", "best"), "inference: expected all, or some of merged, stochastic, fixed, ensemble, got best"),
        (("--rule", "sum"), "rule: expected one of mean, jigsaw, got 'sum'"),
        (("--split", "train"), "split: expected one of validation, test, got 'train'"),
        (("--weights", "first"), "weights: expected best or last, got 'first'"),
        (("--data", "offline:digits"), "data: offline:digits has 10 classes, the model 3"),
        (("--model", "vit_tiny_patch16_24"), "did you mean vit_tiny_patch16_224"),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, trained: tuple[Path, str], command: Any):
    result = command("evaluate", trained[0], *words, "--cpu")
    assert result.exit_code == 1
    assert message in result.stderr


def test_folders_that_hold_nothing(command: Any, tmp_path: Path):
    result = command("evaluate", tmp_path)
    assert result.exit_code == 1
    assert "expected config.json of a run or adapter_config.json of an adapter, found neither" in result.stderr
    result = command("evaluate", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "no folder" in result.stderr
