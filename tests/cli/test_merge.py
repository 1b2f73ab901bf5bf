"""`mosa-kernels merge`: a file of plain weights that computes what the adapters did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mosa_kernels.cli import merge as merge_module
from mosa_kernels.train.evaluate import merged_by
from mosa_kernels.train.merging import load_merged
from mosa_kernels.train.saved import open_saved


@pytest.mark.parametrize("rule", ["mean", "jigsaw"])
def test_the_file_computes_what_evaluation_did(rule: str, trained: tuple[Path, str], command: Any, tmp_path: Path):
    target = tmp_path / "merged.safetensors"
    result = command("merge", trained[0], "--output", target, "--rule", rule)
    assert result.exit_code == 0, result.output
    assert "merging changed nothing: largest logit difference" in result.stdout
    card = json.loads(target.with_suffix(".json").read_text())
    assert card["rule"] == rule
    assert card["check"]["unchanged"] is True
    assert card["class_names"] == ["cross", "disc", "stripes"]
    assert not [name for name in load_file(target) if "assignment" in name]
    model = open_saved(trained[0]).model
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad(), merged_by(model, rule):
        torch.testing.assert_close(load_merged(target)(images), model(images), rtol=1e-5, atol=1e-5)
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


def test_accuracies_stand_side_by_side(trained: tuple[Path, str], command: Any, pictures: Path, tmp_path: Path):
    result = command("merge", trained[0], "--output", tmp_path / "merged.safetensors", "--data", pictures)
    assert result.exit_code == 0, result.output
    for words in ("validation images", "adapters, evaluation mode (mean)", "merged, plain", "adapters, stochastic"):
        assert words in result.stdout


def test_a_merge_that_changes_the_model_is_not_written(
    trained: tuple[Path, str], command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = merge_module.merged_copy
    monkeypatch.setattr(merge_module, "merged_copy", lambda model, rule: original(model, "jigsaw"))
    with torch.no_grad():
        result = command("merge", trained[0], "--output", tmp_path / "merged.safetensors", "--rule", "mean")
    assert result.exit_code == 1
    assert "MERGING CHANGED THE MODEL" in result.stdout
    assert "nothing was written" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_linear_probe_has_nothing_to_merge(command: Any, pictures: Path, tmp_path: Path):
    folder = tmp_path / "linear"
    words = ("--method", "linear", "--epochs", 1, "--batch-size", 5, "--cpu")
    assert command("train", "--data", pictures, "--output", folder, *words).exit_code == 0
    result = command("merge", folder, "--output", tmp_path / "merged.safetensors")
    assert result.exit_code == 1
    assert "there is nothing to merge" in result.stderr
    assert command("evaluate", folder, "--cpu").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "merged.pth"), "output: expected a file ending in .safetensors, got merged.pth"),
        (("--output", "merged.safetensors", "--rule", "sum"), "rule: expected one of mean, jigsaw, got 'sum'"),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, trained: tuple[Path, str], command: Any):
    result = command("merge", trained[0], *words)
    assert result.exit_code == 1
    assert message in result.stderr
