"""`mosa-kernels merge`: a file that computes what the adapters did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mosa_kernels.cli import merge as merge_module
from mosa_kernels.peft import MoSAConfig, inject_adapter
from mosa_kernels.train.evaluate import merged_by
from mosa_kernels.train.exporting import export_program, takes_any_batch, write_program
from mosa_kernels.train.merging import load_merged, merged_copy
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
    result = command("evaluate", folder, "--cpu", "--rule", "mean")
    assert result.exit_code == 1
    assert "rule: has no effect here: " in result.stderr
    assert command("evaluate", folder, "--cpu").exit_code == 0


def test_the_card_says_what_the_images_went_through(command: Any, pictures: Path, tmp_path: Path):
    words = ("--model", "vit_tiny_patch16_224", "--no-pretrained", "--image-size", 32, "--epochs", 1, "--batch-size", 5)
    kinds = {"none": (1.0, "squash"), "paper": (0.9, "center")}
    for augment, expected in kinds.items():
        run, target = tmp_path / augment, tmp_path / f"{augment}.safetensors"
        result = command("train", "--data", pictures, "--output", run, *words, "--augment", augment, "--cpu")
        assert result.exit_code == 0, result.output
        assert command("merge", run, "--output", target).exit_code == 0
        recorded = [json.loads((run / name).read_text()) for name in ("config.json", "result.json")]
        for each in (*recorded, json.loads(target.with_suffix(".json").read_text())):
            shown = each["normalisation"]
            assert (shown["crop_pct"], shown["crop_mode"], shown["input_size"]) == (*expected, [3, 32, 32])
    config = json.loads((tmp_path / "none" / "config.json").read_text())
    del config["transforms"]  # a run that was made before it was recorded, with the model's own crop
    config["normalisation"] |= {"crop_pct": 0.9, "crop_mode": "center"}
    (tmp_path / "none" / "config.json").write_text(json.dumps(config))
    assert command("merge", tmp_path / "none", "--output", tmp_path / "older.pt2").exit_code == 0
    assert json.loads((tmp_path / "older.json").read_text())["normalisation"]["crop_mode"] == "squash"


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mosa_kernels", "timm"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import load_file, save_file
program = torch.export.load(sys.argv[1]).module()
images = load_file(sys.argv[2])["images"]
save_file({"all": program(images), "first": program(images[:1])}, sys.argv[3])
assert not {"mosa_kernels", "timm"} & sys.modules.keys()
"""


def run_alone(program: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of all images, and of the first by itself, from a process that knows PyTorch only."""
    given, made = program.with_name("in.safetensors"), program.with_name("out.safetensors")
    save_file({"images": images}, given)
    words = [sys.executable, "-c", ALONE, str(program), str(given), str(made)]
    alone = subprocess.run(words, cwd=program.parent, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    return load_file(made)


def test_a_program_runs_without_the_package(trained: tuple[Path, str], command: Any, tmp_path: Path):
    target = tmp_path / "model.pt2"
    result = command("merge", trained[0], "--output", target)
    assert result.exit_code == 0, result.output
    card = json.loads(target.with_suffix(".json").read_text())
    assert (card["class_names"], card["batch"]) == (["cross", "disc", "stripes"], "any")
    assert card["normalisation"]["input_size"] == [3, 32, 32]
    assert card["normalisation"] == json.loads((trained[0] / "config.json").read_text())["normalisation"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt2"]
    images = torch.randn(5, 3, 32, 32)
    found = run_alone(target, images)
    with torch.no_grad():
        expected = open_saved(trained[0]).model(images)
    torch.testing.assert_close(found["all"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["first"], expected[:1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"torch.export.load opens a .pt2"):
        load_merged(target)


def test_a_swin_is_exported_too(tmp_path: Path):
    small = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **small)
    inject_adapter(model, MoSAConfig(bottleneck=4, num_experts=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    merged = merged_copy(model)
    write_program(export_program(merged, (3, 32, 32)), tmp_path / "swin.pt2", {})
    images = torch.randn(5, 3, 32, 32)
    found = run_alone(tmp_path / "swin.pt2", images)
    with torch.no_grad():
        torch.testing.assert_close(found["all"], merged(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["first"], merged(images[:1]), rtol=1e-5, atol=1e-5)


class OneByOne(torch.nn.Module):
    """Takes single images only, once it is exported."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([image[None].mean((2, 3)) for image in images.unbind()])


def test_a_model_whose_code_counts_images_is_exported_for_one():
    program = export_program(OneByOne(), (3, 4, 4))
    assert not takes_any_batch(program)
    images = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(program.module()(images), images.mean((2, 3)))


def test_a_model_that_cannot_be_exported_is_said():
    class Undecided(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))

    with pytest.raises(ValueError, match=r"output: torch\.export does not take this model \(.*; a \.safetensors file"):
        export_program(Undecided(), (3, 4, 4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "merged.pth"), "output: expected a file ending in .safetensors or .pt2, got merged.pth"),
        (("--output", "merged.safetensors", "--rule", "sum"), "rule: expected one of mean, jigsaw, got 'sum'"),
        (
            ("--output", "merged.safetensors", "--data-root", "elsewhere", "--split", "test"),
            "data_root, split: expected together with --data, which says what to compare on",
        ),
        (
            ("--output", "merged.safetensors", "--batch-size", "4", "--workers", "1"),
            "batch_size, workers: expected together with --data",
        ),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, trained: tuple[Path, str], command: Any):
    result = command("merge", trained[0], *words)
    assert result.exit_code == 1
    assert message in result.stderr
