"""`mosa-kernels tsne`: features of several runs in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import make_pictures

from mosa_kernels.train.embedding import NEIGHBOURS, neighbour_accuracy


def test_two_runs_side_by_side(trained: tuple[Path, str], command: Any, pictures: Path, tmp_path: Path):
    short = ("--data", pictures, "--epochs", "1", "--batch-size", "5", "--cpu")
    linear = tmp_path / "linear"
    assert command("train", *short, "--method", "linear", "--output", linear).exit_code == 0
    data = make_pictures(tmp_path / "more", {"train": 1, "val": 1, "test": 20})
    result = command(
        "tsne", trained[0], linear, "--data", data, "--images", "50", "--output", tmp_path / "new" / "f.png"
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "new" / "f.png").read_bytes()[:4] == b"\x89PNG"
    runs = json.loads((tmp_path / "new" / "f.json").read_text())["runs"]
    assert [run["title"] for run in runs] == ["mosa", "linear"]
    for run in runs:
        assert run["images"] == 50
        assert 34 < run["neighbours"] <= 100  # three classes
        assert -1 < run["silhouette"] < 1
    assert runs[0]["silhouette"] != runs[1]["silhouette"]


def test_neighbours_vote():
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    apart = torch.eye(3)[labels] * (0.5 + torch.rand(120, 1)) + 0.01 * torch.randn(120, 3)
    assert neighbour_accuracy(apart, labels) == 100
    assert neighbour_accuracy(torch.randn(120, 3), labels) < 60
    one_of_each = torch.arange(NEIGHBOURS + 5)
    assert neighbour_accuracy(torch.randn(NEIGHBOURS + 5, 4), one_of_each) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "picture.jpg"), "output: expected a file that ends in .png, got picture.jpg"),
        (("--output", "x.png", "--split", "train"), "split: expected one of validation, test, got 'train'"),
        (("--output", "x.png"), "images: expected more than 20, of two classes at least"),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, trained: tuple[Path, str], command: Any):
    result = command("tsne", trained[0], *words)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
