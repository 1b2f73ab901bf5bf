"""`mosa-kernels evaluate`: every mechanism, from a run or an adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image
from rich.console import Console

from mosa_kernels.cli.opened import open_loader
from mosa_kernels.train.saved import open_saved


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
    assert "note" not in result.stdout
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
        (
            ("--rule", "mean", "--inference", "fixed"),
            "rule: expected together with --inference merged, got --inference fixed",
        ),
        (("--seed", "3", "--inference", "ensemble"), "seed: expected together with --inference stochastic, got"),
        (("--split", "train"), "split: expected one of validation, test, got 'train'"),
        (("--seed", str(2**64)), "seed: expected a whole number of 64 bits, got 18446744073709551616"),
        (("--weights", "first"), "weights: expected best or last, got 'first'"),
        (("--data", "offline:digits"), "data: offline:digits has 10 classes, the model 3"),
        (("--data", ""), "does not say what it was trained on; give --data"),
        (("--model", "vit_tiny_patch16_24"), "did you mean vit_tiny_patch16_224"),
    ],
)
def test_bad_requests(words: tuple[str, ...], message: str, trained: tuple[Path, str], command: Any):
    result = command("evaluate", trained[0], *words, "--cpu")
    assert result.exit_code == 1
    assert message in result.stderr


def test_one_adapter_of_a_run_has_no_choice_of_weights(trained: tuple[Path, str], command: Any):
    result = command("evaluate", trained[0] / "adapter" / "best", "--weights", "last", "--cpu")
    assert result.exit_code == 1
    assert f"weights: 'last' needs the folder of the run, {trained[0]}; " in result.stderr


def test_a_record_in_other_bytes_is_named(command: Any, tmp_path: Path):
    (tmp_path / "config.json").write_bytes('{"data": "Käfer"}'.encode("latin-1"))
    result = command("evaluate", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path}/config.json: expected JSON in UTF-8, got other bytes at 11" in result.stderr


def test_folders_that_hold_nothing(command: Any, tmp_path: Path):
    result = command("evaluate", tmp_path)
    assert result.exit_code == 1
    assert "expected config.json of a run or adapter_config.json of an adapter, found neither" in result.stderr
    result = command("evaluate", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "no folder" in result.stderr


@pytest.fixture
def renamed(pictures: Path, tmp_path: Path) -> Path:
    """The same pictures, the class that came first under a name that comes last."""
    folder = tmp_path / "renamed"
    shutil.copytree(pictures, folder)
    for split in folder.iterdir():
        (split / "cross").rename(split / "zigzag")
    return folder


@pytest.mark.parametrize("name", ["evaluate", "merge", "tsne"])
def test_data_with_other_classes_are_refused(name: str, trained: tuple[Path, str], command: Any, renamed: Path):
    output = ("--output", renamed.parent / ("x.png" if name == "tsne" else "x.safetensors"))
    words = (name, trained[0], "--data", renamed, *(() if name == "evaluate" else output))
    result = command(*words)
    assert result.exit_code == 1
    assert (
        "folder:renamed has other classes than the model was trained on: label 0 was 'cross' and is 'disc', label"
        in (result.stderr)
    )
    if name != "tsne":  # which needs more pictures
        assert command(*words, "--any-classes").exit_code == 0


def test_a_run_that_does_not_name_its_classes_is_still_read(
    trained: tuple[Path, str], command: Any, renamed: Path, tmp_path: Path
):
    older = tmp_path / "older"
    shutil.copytree(trained[0], older)
    config = json.loads((older / "config.json").read_text())
    assert config["data"].pop("class_names") == ["cross", "disc", "stripes"]
    (older / "config.json").write_text(json.dumps(config))
    result = command("evaluate", older, "--data", renamed, "--cpu")
    assert result.exit_code == 0, result.output
    assert "does not name its classes: only their number was compared" in " ".join(result.stdout.split())
    result = command("train", "--output", older, "--resume")
    assert result.exit_code == 0, result.output
    assert "the run does not name its classes" in " ".join(result.stdout.split())


def test_another_place_of_the_data_is_looked_into(trained: tuple[Path, str], command: Any, pictures: Path):
    folder, _ = trained
    result = command("evaluate", folder, "--data-root", pictures.parent / "nowhere", "--data", "vtab:cifar")
    assert result.exit_code != 0
    assert "nowhere" in result.output
    saved = open_saved(folder)
    saved.settings = dataclasses.replace(saved.settings, data="torchvision:CIFAR10")
    console = Console()
    options = {"any_classes": False, "batch_size": 8, "workers": 0}
    with mock.patch("mosa_kernels.cli.opened.open_splits", side_effect=KeyError) as opened, pytest.raises(KeyError):
        open_loader(saved, "test", console, data=None, data_root="elsewhere", **options)
    settings = opened.call_args.args[0]
    assert (settings.data, settings.data_root) == (saved.settings.data, "elsewhere")
    for words in (("evaluate", folder), ("check-data", pictures)):
        result = command(*words, "--data-root", pictures)
        assert result.exit_code == 1
        assert (
            "data_root: has no effect here: the data are a folder of images (named data sets begin with"
            in result.stderr
        )


@pytest.fixture
def oblong(pictures: Path, tmp_path: Path) -> Path:
    """The pictures at twice their width, as folders and as the lists of a data set of VTAB-1k."""
    folder = tmp_path / "dtd"
    lines: dict[str, list[str]] = {}
    for path in sorted(pictures.rglob("*.png")):
        target = folder / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            picture.resize((64, 32)).save(target)
        split, name, _ = path.relative_to(pictures).parts
        label = ("cross", "disc", "stripes").index(name)
        lines.setdefault(split, []).append(f"{target.relative_to(folder)} {label}")
    lists = {"train800": ["train"], "val200": ["val"], "train800val200": ["train", "val"], "test": ["test"]}
    for name, splits in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(line for split in splits for line in lines[split]))
    return folder


def test_images_are_resized_as_in_the_run(command: Any, oblong: Path, tmp_path: Path):
    """The official recipe leaves the images of VTAB-1k whole, and crops those of folders."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    words = ("--recipe", "official", "--method", "linear", "--epochs", 2, "--batch-size", 5, "--lr", 0.02, "--cpu")
    result = command("train", "--data", f"vtab:{oblong}", "--output", run, *words)
    assert result.exit_code == 0, result.output
    assert "crop_pct 1.0, crop_mode squash" in " ".join(result.output.replace("│", " ").split())

    def evaluated(folder: Path, *words: object) -> Any:
        result = command("evaluate", folder, *words, "--cpu", "--output", tmp_path / "found.json")
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "found.json").read_text())["results"]["plain"]

    own, other = evaluated(run), evaluated(run, "--data", oblong, "--any-classes")
    assert other["nll"] == pytest.approx(own["nll"], rel=1e-6)
    config = json.loads((run / "config.json").read_text())
    assert config["normalisation"] == json.loads((run / "result.json").read_text())["normalisation"]
    shutil.copytree(run, alone)
    assert config.pop("transforms") == "none"  # as in runs that were made before it was recorded
    config["normalisation"] |= {"crop_pct": 0.9, "crop_mode": "center"}
    (alone / "config.json").write_text(json.dumps(config))
    assert evaluated(alone, "--data", oblong, "--any-classes")["nll"] != pytest.approx(own["nll"], rel=1e-3)
    assert evaluated(alone)["nll"] == pytest.approx(own["nll"], rel=1e-6)
    result = command("train", "--output", alone, "--resume")
    assert result.exit_code == 0, result.output
