"""`mosa-kernels train`: what it prints, stores, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mosa_kernels.cli.train import settings_of
from mosa_kernels.train.folder import require_same
from mosa_kernels.train.relevance import refuse_meaningless
from mosa_kernels.train.settings import Settings


def test_it_prints_what_it_will_do_and_what_came_out(trained: tuple[Path, str]):
    folder, printed = trained
    for words in (
        "15 training",
        "recipe paper",
        "sha256",
        "normalisation",
        "epoch 2/2",
        "merged by mean (reported)",
        "stochastic",
    ):
        assert words in " ".join(printed.split()), words
    assert json.loads((folder / "result.json").read_text())["test"].keys() == {"mean", "jigsaw", "stochastic"}


def test_resume_needs_no_other_words_and_changes_nothing_in_a_finished_run(trained: tuple[Path, str], command: Any):
    folder, _ = trained
    before = (folder / "result.json").read_text()
    result = command("train", "--output", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert (folder / "result.json").read_text() == before


def test_a_stopped_run_says_how_to_go_on(command: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mosa_kernels.train.objective import Objective

    calls, original = 0, Objective.__call__

    def stopped(self: Objective, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    folder = tmp_path / "a run"
    words = (
        "--data",
        pictures,
        "--epochs",
        2,
        "--batch-size",
        5,
        "--bottleneck",
        4,
        "--cpu",
        "--method",
        "adaptformer",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", stopped)
        result = command("train", "--output", folder, *words)
    assert result.exit_code == 130
    printed = " ".join(result.stdout.split())
    assert "1 of 2 epochs are complete and kept" in printed
    assert "mosa-kernels train --output" in printed
    assert "--resume" in printed
    assert command("train", "--output", folder, "--resume").exit_code == 0
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_official_recipe_and_its_overrides_are_stored():
    settings = settings_of(
        {"data": "x", "recipe": "official", "epochs": 20, "layers": "0,2", "expert_scale": "N"}, None
    )
    assert settings.recipe.name == "official"
    assert (settings.recipe.epochs, settings.recipe.warmup_epochs, settings.recipe.seed) == (20, 2, 3407)
    assert (settings.adapter.layers, settings.adapter.expert_scale) == ((0, 2), "N")
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.01, "batch_size": 64, "method": "sparseadapter", "dropout": 0.1},
        {"recipe": "paper", "epochs": 5},
        {"recipe": "paper", "lr": 0.0005},
        {"recipe": "official", "epochs": 7, "warmup_epochs": 0.0},
        {"recipe": "official", "regularisation": "consistency+alignment", "base_lr": 0.01, "lr_scaled": True},
    ],
)
def test_options_given_again_on_resuming_are_no_difference(given: dict[str, Any]):
    settings = settings_of({"data": "x", **given}, None)
    assert settings_of({"data": "x", **given}, settings.as_dict()) == settings
    assert settings_of({}, settings.as_dict()) == settings
    assert settings_of({"recipe": settings.recipe.name}, settings.as_dict()) == settings
    assert settings_of({"lr": 0.02}, settings.as_dict()) != settings


def test_another_length_on_resuming_is_named_not_a_warm_up_that_nobody_gave():
    before = settings_of({"data": "x"}, None)
    for given in ({"epochs": 5}, {"epochs": 5, "recipe": "official"}):
        now = settings_of(given, before.as_dict())
        assert now.recipe.epochs == 5
        with pytest.raises(ValueError, match=r"recipe.epochs: the run has 100, now 5"):
            require_same(before.flat(), now.flat(), "settings")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"method": "linear", "bottleneck": 4}, "bottleneck: .* 'linear' has no adapters"),
        ({"method": "linear", "dropout": 0.5}, "dropout: .* 'linear' has no bottleneck"),
        ({"method": "bitfit", "layers": "0"}, "layers: .* 'bitfit' has no adapters"),
        ({"method": "full", "prompt_length": 5}, "prompt_length: .* 'full' has no adapters"),
        ({"method": "vpt-deep", "scale": 0.3}, "scale: .* 'vpt-deep' has no adapters"),
        ({"method": "adaptformer", "num_experts": "8"}, "num_experts: .* 'adaptformer' has no experts"),
        ({"method": "adaptformer", "inference": "ensemble"}, "inference: .* no experts"),
        ({"method": "adaptformer", "lora_targets": "q"}, "lora_targets: .* 'adaptformer' adapts no linear layers"),
        ({"method": "adaptformer", "alpha": 5.0}, "alpha: .* cross-entropy alone"),
        ({"method": "mosa", "passes": 1, "regularisation": "consistency"}, "regularisation: .* cross-entropy alone"),
        ({"method": "mosa", "prompt_length": 5}, "prompt_length: .* 'mosa' has no prompts"),
        ({"method": "sparseadapter", "sparse": "down"}, "sparse: .* one fixed mask for both projections"),
        ({"method": "mosl", "expert_bias": False}, "expert_bias: .* 'lora' has no bias"),
        ({"method": "mosa", "data": "offline:count", "download": True}, "download: .* drawn in memory"),
        ({"method": "mosa", "data": "offline:count", "labels_per_class": 5}, "labels_per_class: .* offline:digits"),
        ({"method": "mosa", "recipe": "official", "beta": 0.1}, "beta: .* no blocks are aligned"),
        ({"method": "mosa", "regularisation": "consistency", "beta_over_depth": True}, "beta_over_depth: .* no blocks"),
        ({"method": "mosa", "beta": 0.0, "align": "deep"}, "align: .* no weight .beta is 0"),
        ({"method": "mosa", "regularisation": "none", "detach": True}, "detach: .* no weight .alpha is 0"),
        ({"method": "mosa", "num_experts": "1", "inference": "ensemble"}, "inference: .* one expert"),
        ({"method": "mosa", "num_experts": "1,1,1,1", "sparse": "both"}, "sparse: .* one expert"),
        ({"method": "mosl", "sparse": "none", "expert_scale": "N"}, "expert_scale: .* one expert"),
        ({"method": "mosa", "sparse": "none", "num_experts": "4"}, "num_experts: .* one expert"),
        ({"method": "adaptformer", "passes": 2}, "passes: .* alike"),
        ({"method": "adaptformer", "optimizer": "mosa"}, "optimizer: .* no experts"),
        ({"method": "bitfit", "optimizer": "mosa"}, "optimizer: .* no experts"),
        ({"method": "mosa", "num_experts": "1", "optimizer": "mosa"}, "optimizer: .* one expert"),
        ({"method": "mosa", "checkpoint": "a.npz", "pretrained": False}, "pretrained: .* a.npz"),
        ({"method": "mosa", "num_experts": "1", "alpha": 2.0}, "alpha: .* alike"),
        ({"method": "mosa", "data": "vtab:/data/cifar", "data_seed": 1}, "data_seed: .* lists"),
        ({"method": "mosa", "data": "fgvc:/data/cub", "download": True}, "download: .* lists"),
        (
            {"method": "mosa", "data": "fgvc:/data/cub", "data_root": "/there"},
            "data_root: .* /data/cub is an absolute path",
        ),
        ({"data": "vtab:cifar=/data/c", "data_root": "/there"}, "data_root: .* /data/c is an absolute path"),
        ({"method": "mosa", "data": "/data/pets", "data_root": "/data"}, "data_root: .* folder of images"),
        ({"method": "linear", "passes": 2}, "passes: expected 1 for method 'linear', .* got 2"),
        ({"method": "mosa", "anchored": True, "regularisation": "none"}, "anchored: expected a consistency loss"),
    ],
)
def test_an_option_without_effect_is_refused(words: dict[str, Any], named: str) -> None:
    given = {"data": "offline:digits", **words}
    with pytest.raises(ValueError, match=named):
        refuse_meaningless(settings_of(given, None), given)


def test_a_seed_of_held_out_parts_is_refused_where_none_are_held_out(tmp_path: Path) -> None:
    for name in ("train", "Val", "test"):
        given = {"data": str(tmp_path), "data_seed": 1}
        refuse_meaningless(settings_of(given, None), given)
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"data_seed: .* the folder says which images are for what"):
        refuse_meaningless(settings_of(given, None), given)
    given["label_noise"] = 0.1
    refuse_meaningless(settings_of(given, None), given)


@pytest.mark.parametrize(
    "words",
    [
        {"method": "vpt-deep", "prompt_length": 5, "layers": "0", "dropout": 0.1},
        {"method": "adaptformer", "passes": 2, "alpha": 0.5, "dropout": "0:0.1", "scale": 1.0, "learnable_scale": True},
        {"method": "sparseadapter", "num_experts": "8", "granularity": "row"},
        {"method": "mosl", "lora_targets": "q,k", "num_experts": "2", "merge_rule": "jigsaw"},
        {"method": "mosa", "anchored": True, "expert_scale": "N", "sparse": "both", "labels_per_class": 5},
        {"method": "linear", "data": "offline:weaves", "labels_per_class": 5},
        {"method": "mosa", "optimizer": "adamw", "checkpoint": "a.npz"},
        {"method": "adaptformer", "optimizer": "adamw", "pretrained": False},
        {"method": "full", "eps": 1e-6, "lr_per_epoch": True, "lr_scaled": False, "base_lr": 0.1},
        {"method": "mosa", "recipe": "official", "align": "first-six", "beta": 0.1, "detach": False},
        {"method": "mosa", "num_experts": "1", "dropout": 0.1, "alpha": 2.0, "align": "all"},
        {"method": "mosa", "num_experts": "4,1", "layers": "0,1", "expert_per": "sample"},
        {"method": "mosa", "data": "fgvc:cub", "data_root": "/data", "data_seed": 1, "label_noise": 0.1},
        {"method": "mosa", "data": "torchvision:CIFAR100", "data_root": "/data", "data_seed": 1, "download": True},
    ],
)
def test_options_with_an_effect_are_taken(words: dict[str, Any]) -> None:
    given = {"data": "offline:digits", **words}
    settings = settings_of(given, None)
    refuse_meaningless(settings, given)
    if "lr_scaled" in words:
        assert (settings.recipe.lr, settings.recipe.eps, settings.recipe.lr_per_epoch) == (0.1, 1e-6, True)


def test_what_is_printed_is_what_is_done(command: Any, tmp_path: Path) -> None:
    words = ("--data", "offline:digits", "--method", "adaptformer", "--epochs", 1, "--bottleneck", 4)
    result = command("train", *words, "--output", tmp_path / "run", "--labels-per-class", 1)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.replace("│", " ").split())  # the cells of a table are wrapped
    for shown in ("activation gelu", "scale 0.1", "norm True", "augment paper (here: nothing)", "crop_mode squash"):
        assert shown in printed, shown
    for hidden in ("num_experts", "regularisation", "expert_per", "prompt_length", "lora_targets"):
        assert hidden not in printed, hidden
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["adapter"] == {"activation": "gelu", "scale": 0.1, "norm": True}
    assert config["augmentations"] == []


def test_lists_are_read() -> None:
    lists = {"data": "x", "method": "mosl", "num_experts": "4,4,2", "lora_targets": "q,proj"}
    adapter = settings_of(lists, None).adapter
    assert (adapter.num_experts, adapter.lora_targets) == ((4, 4, 2), ("q", "proj"))
    assert settings_of({"data": "x", "num_experts": "3"}, None).adapter.num_experts == 3
    assert settings_of({"data": "x", "num_experts": "1:4"}, None).adapter.num_experts == "1:4"
    for words, dropout in (("0.1", 0.1), ("0,0.2", (0.0, 0.2)), ("0:0.3", "0:0.3")):
        assert settings_of({"data": "x", "dropout": words}, None).recipe.dropout == dropout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "data: expected a folder of images or a name such as offline:digits; give --data"),
        (("--data", "/no/such/folder"), "data: '/no/such/folder' is neither a folder nor a name"),
        (("--data", "~no-such-user/x"), "data: '~no-such-user/x' is neither a folder nor a name"),
        (
            ("--data", "vtab:cifar", "--data-root", "~no-such-user"),
            "was looked for in ~no-such-user/cifar, which does not exist",
        ),
        (("--data", "offline:digitz"), "offline task: expected one of digits"),
        (("--data", "offline:digits", "--model", "vit_base_patch16_244"), "did you mean vit_base_patch16_224"),
        (("--data", "offline:digits", "--method", "adaptfromer"), "did you mean adaptformer?"),
        (("--data", "offline:digits", "--recipe", "papper"), "recipe: expected one of paper, official, got 'papper'"),
        (("--data", "offline:digits", "--lr", "1", "--base-lr", "1"), "lr, base_lr: expected one of them, got both"),
        (("--data", "offline:digits", "--lr", "1", "--lr-scaled"), "lr_scaled: it is for base_lr"),
        (("--data", "offline:digits", "--lr", "nan"), "error: lr: expected a finite number of at least 0, got nan"),
        (("--data", "offline:digits", "--lr=-1"), "error: lr: expected a finite number of at least 0, got -1.0"),
        (("--data", "offline:digits", "--base-lr", "inf"), "error: base_lr: expected a finite number of at least 0"),
        (("--data", "offline:digits", "--seed", str(2**64)), "seed: expected a whole number of 64 bits"),
        (("--data", "offline:digits", "--passes", "3"), "passes: expected 1 or 2, got 3"),
        (("--data", "offline:digits", "--mixed-precision", "fp8"), "mixed_precision: expected one of no, bf16, fp16"),
        (("--data", "offline:digits", "--mixed-precision", "fp16", "--cpu"), "fp16 needs a GPU"),
        (("--data", "offline:digits", "--accumulate", "3"), "accumulate: expected a divisor of the batch size 128"),
        (("--data", "offline:digits", "--layers", "first"), "layers: expected numbers of blocks such as 0,1,5"),
        (("--data", "offline:digits", "--num-experts", "few"), "num_experts: expected a number, one per block"),
        (("--data", "offline:digits", "--num-experts", "1:x"), "or the first and the last as '1:4', got '1:x'"),
        (("--data", "offline:digits", "--dropout", "some"), "dropout: expected a number, one per block such as 0,0.1"),
        (("--data", "offline:digits", "--dropout", "0:x"), "or the first and the last as '0:0.3', got '0:x'"),
        (("--data", "offline:digits", "--dropout", "0,0.1"), "dropout: expected one number, or one for each of the 4"),
        (("--data", "offline:digits", "--bottleneck", "0"), "bottleneck: expected at least 1, got 0"),
        (("--data", "/no/such/folder", "--model", "resnet18"), "model: expected a timm ViT"),
        (("--data", "/no/such/folder", "--layers", "4"), "layers: expected indices from -4 to 3 for 4 blocks, got 4"),
        (("--data", "offline:digits", "--checkpoint", "/no/file.npz"), "checkpoint: no file /no/file.npz"),
        (("--resume",), "there is no run to resume or read"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_wrong(
    words: tuple[str, ...], message: str, command: Any, tmp_path: Path
):
    result = command("train", "--output", tmp_path / "run", *words)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_wherever_it_is_read(workers: int, command: Any, pictures: Path, tmp_path: Path):
    shutil.copytree(pictures, tmp_path / "pictures")
    broken = tmp_path / "pictures" / "train" / "disc" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    words = ("--data", tmp_path / "pictures", "--method", "linear", "--epochs", 1, "--batch-size", 5, "--cpu")
    result = command("train", "--output", tmp_path / "run", "--workers", workers, *words)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot read the image {broken}: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_image_that_the_test_meets_costs_no_training(command: Any, pictures: Path, tmp_path: Path):
    data, run = tmp_path / "my pictures", tmp_path / "a run"
    shutil.copytree(pictures, data)
    broken = data / "test" / "disc" / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    words = ("--data", data, "--method", "linear", "--epochs", 2, "--batch-size", 5, "--cpu")
    result = command("train", "--output", run, *words)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    again = f"mosa-kernels train --output '{run}' --resume"
    for said in (
        f"error: cannot read the image {broken}: ",
        f"All 2 epochs are complete, with their weights in {run / 'adapter'}; the test is missing. ",
        f"All images that cannot be read: mosa-kernels check-data '{data}' --decode. ",
        f"Then go on with: {again}; ",
        f"with files replaced, which it refuses as other data: mosa-kernels evaluate '{run}'",
    ):
        assert said in line
    assert str(broken) in command("check-data", data, "--decode").stderr
    again = command("train", "--output", run, "--resume")  # it says the same again
    assert again.stderr == result.stderr
    broken.write_bytes(whole)
    assert "resume: other data than the run began with" in command("train", "--output", run, "--resume").stderr
    assert command("evaluate", run, "--cpu").exit_code == 0


def test_an_existing_run_is_not_overwritten(trained: tuple[Path, str], command: Any, pictures: Path):
    folder, _ = trained
    result = command("train", "--data", pictures, "--output", folder)
    assert result.exit_code == 1
    assert "it holds a run; go on with --resume" in result.stderr
    result = command("train", "--output", folder, "--resume", "--epochs", 5)
    assert result.exit_code == 1
    assert "recipe.epochs: the run has 2, now 5" in result.stderr


def test_a_damaged_state_is_one_line(trained: tuple[Path, str], command: Any, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    (folder / "result.json").unlink()
    (weights,) = folder.glob("state/epoch-*/run.tensors.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    result = command("train", "--output", folder, "--resume")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: training state {weights}: damaged: ")
    shutil.rmtree(folder / "state")
    result = command("train", "--output", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert (folder / "result.json").is_file()
