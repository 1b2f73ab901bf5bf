"""`mosa-kernels demo --quick`: every part of the demo, for seconds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mosa_kernels.cli import demo as demo_module
from mosa_kernels.data.splits import ArrayDataset, DataSplits
from mosa_kernels.train import comparison_runs
from mosa_kernels.train.comparison import CONTENDERS, demo_splits
from mosa_kernels.train.merging import load_merged


def few_test_images(seed: int) -> DataSplits:
    splits = demo_splits(seed)
    assert isinstance(splits.test, ArrayDataset)
    return dataclasses.replace(splits, test=ArrayDataset(splits.test.images[:200], splits.test.labels[:200]))


@pytest.mark.slow
def test_quick_demo_leaves_tables_picture_and_weights(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_module, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(demo_module, "demo_splits", few_test_images)
    monkeypatch.setattr(comparison_runs, "data_of", few_test_images)
    result = command("demo", "--quick", "--output", tmp_path, "--workers", 1)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    assert "these are not the real figures" in printed
    assert "merging changed nothing" in printed
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["quick"] is True
    assert "core(s)" in record["machine"]
    assert record["methods"].keys() == {contender.key for contender in CONTENDERS}
    for method in record["methods"].values():
        assert 0 < method["accuracy"] <= 100
        assert method["seconds"] > 0
        assert method["parameters_trained"] > 0
    mosa = record["methods"]["mosa-rising"]["mechanisms"]
    assert {"fixed", "stochastic", "ensemble", "mean", "jigsaw"} <= mosa.keys()
    assert record["verdict"] in (tmp_path / "demo.md").read_text()
    assert (tmp_path / "demo.md").read_text().startswith("QUICK")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert load_merged(tmp_path / "mosa" / "merged.safetensors").num_classes == 10


def test_a_failed_merge_fails_the_demo(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without any training: the outcomes are made up, one of them with a merge that changed the model."""
    from mosa_kernels.train.comparison import Outcome

    def made_up(tasks: Any, processes: int, console: Any) -> list[Outcome]:
        found = []
        for task in tasks:
            mosa = task.contender.method == "mosa"
            merge = {"largest_difference": 1.0, "same_predictions": 5, "images": 9, "unchanged": False}
            row = {"epoch": 1, "loss": 1.0, "train_accuracy": 10.0}
            measured = {"mean" if mosa else "plain": {"accuracy": 10.0, "nll": 2.0}}
            reported = "mean" if mosa else "plain"
            found.append(Outcome(task.contender, 0, measured, reported, 1, 1, 1.0, [row], merge if mosa else None))
        return found

    monkeypatch.setattr(demo_module, "watch", made_up)
    result = command("demo", "--quick", "--output", tmp_path, "--workers", 1)
    assert result.exit_code == 1
    assert "MERGING CHANGED A MODEL" in " ".join(result.stdout.split())
