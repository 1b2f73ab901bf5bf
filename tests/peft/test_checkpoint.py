from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm_models import FAMILIES, SWIN, VIT, Family, family_of, images, make, train_a_little
from torch import nn

from mosa_kernels import _weights
from mosa_kernels.peft import (
    AdapterFileError,
    BackboneMismatchError,
    MoSAConfig,
    active_adapter,
    adapter_names,
    disable_adapter,
    inject_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
)
from mosa_kernels.peft.files import read_adapter, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(family: Family = VIT, name: str = "default", **options: object) -> nn.Module:
    model = inject_adapter(make(family), MoSAConfig(bottleneck=4, **options), name)  # type: ignore[arg-type]
    train_a_little(model, name)
    with torch.no_grad():
        model.get_classifier().weight.mul_(2)
    return model


@pytest.mark.parametrize("family", [VIT, SWIN, FAMILIES[5], FAMILIES[18]], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "options", [{}, {"mode": "pruned"}, {"mode": "dense"}, {"sparse": "both", "layers": (1,)}], ids=str
)
@torch.no_grad()
def test_what_is_loaded_is_what_was_saved(family: Family, options: dict, tmp_path: Path) -> None:
    model, x = trained(family, **options), images(family)
    save_adapter(model, tmp_path / "deep" / "adapter")
    loaded = load_adapter(make(family), tmp_path / "deep" / "adapter")
    assert torch.equal(loaded(x), model(x))
    for mode in (True, False):  # experts and splits as well
        torch.manual_seed(0)
        a = model.train(mode)(x)
        torch.manual_seed(0)
        assert torch.equal(loaded.train(mode)(x), a)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@torch.no_grad()
def test_several_names(tmp_path: Path) -> None:
    model, x = trained(name="a"), images()
    inject_adapter(model, MoSAConfig(bottleneck=3, style="houlsby"), "b", num_classes=4)
    train_a_little(model, "b")
    save_adapter(model, tmp_path / "b")
    save_adapter(model, tmp_path / "a", "a")
    assert active_adapter(model) == "b"
    loaded = load_adapter(make(), tmp_path / "a")
    with pytest.raises(ValueError, match="head: the adapter was saved with 4 classes, the model has 10"):
        load_adapter(loaded, tmp_path / "b")
    assert (adapter_names(loaded), active_adapter(loaded)) == (["a"], "a")
    load_adapter(loaded, tmp_path / "b", "c", new_head=True)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(set_adapter(loaded, "a")(x), set_adapter(model, "a")(x))


@torch.no_grad()
def test_an_injected_model_takes_the_weights(tmp_path: Path) -> None:
    model, x = trained(), images()
    save_adapter(model, tmp_path)
    fresh = inject_adapter(make(), MoSAConfig(bottleneck=4))
    weight = next(p for n, p in fresh.named_parameters() if n.endswith("up.weight"))
    assert torch.equal(load_adapter(fresh, tmp_path)(x), model(x))
    assert any(weight is p for p in fresh.parameters()), "an optimizer's parameters stay the same"
    other = inject_adapter(make(), MoSAConfig(bottleneck=4, seed=1))
    with pytest.raises(ValueError, match=r"'default' is taken .* seed is 1, saved with 0"):
        load_adapter(other, tmp_path)


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    described = json.loads((tmp_path / CONFIG).read_text())
    assert described["config"] == MoSAConfig(bottleneck=4).to_dict()
    assert described["backbone"]["architecture"] == VIT.name
    assert len(described["backbone"]["sha256"]) == 64
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["adapters.blocks.0.parallel_ffn.up.assignment"].dtype == torch.uint8
    assert tensors["head.head.weight"].shape == (10, 48)
    assert not any("attn" in key for key in tensors)


def refused(model: nn.Module, directory: Path, **options: bool) -> str:
    """The message; and the model is as it was."""
    keys, x = list(model.state_dict()), images()
    before, trainable = model(x), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((BackboneMismatchError, ValueError, FileNotFoundError)) as raised:
        load_adapter(model, directory, **options)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    return str(raised.value)


@torch.no_grad()
def test_another_backbone_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    model = trained()
    save_adapter(model, tmp_path)
    deeper = refused(make(depth=3), tmp_path)
    assert "blocks.2.attn.proj.bias: saved with shape none, the model has [48]" in deeper
    assert "and 9 more shapes" in deeper
    relative = next(family for family in FAMILIES if family.name == "deit_tiny_patch16_224")
    renamed = refused(make(relative), tmp_path, ignore_backbone_hash=True)
    assert "architecture: saved with 'vit_tiny_patch16_224', the model is 'deit_tiny_patch16_224'" in renamed
    nudged = make()
    nudged.blocks[1].norm1.weight[3] += 1e-5
    assert "hash of the weights" in refused(nudged, tmp_path)
    assert "ignore_backbone_hash=True" in refused(nudged, tmp_path)
    load_adapter(nudged, tmp_path, ignore_backbone_hash=True)
    for classes in (7, 0):
        other = make()
        other.reset_classifier(classes)
        assert f"head: the adapter was saved with 10 classes, the model has {classes}" in refused(other, tmp_path)


@torch.no_grad()
def test_where_no_adapter_runs_none_does_after_an_error(tmp_path: Path) -> None:
    save_adapter(trained(name="saved"), tmp_path)
    description, tensors = read_adapter(tmp_path)
    tensors.popitem()
    write_adapter(tmp_path, description, tensors)
    model = trained(name="first")
    with disable_adapter(model):
        assert "it does not fit its configuration: missing" in refused(model, tmp_path)
        assert active_adapter(model) is None


@pytest.mark.parametrize(
    ("family", "before", "pooling"),
    [(VIT, "token", "avg"), (SWIN, "avg", "max"), (family_of("hiera_tiny"), "avg", "max")],
    ids=["vit", "swin", "hiera"],
)
@torch.no_grad()
def test_another_pooling_is_refused(family: Family, before: str, pooling: str, tmp_path: Path) -> None:
    """No weight shows it, and the logits would be others."""
    model, same = make(family), make(family)
    for each in (model, same):
        each.reset_classifier(10, pooling)
        if family is SWIN:
            each.global_pool = before  # as timm 1.0.21 leaves it; the head pools
    save_adapter(inject_adapter(model, MoSAConfig(bottleneck=4)), tmp_path)
    said = refused(make(family), tmp_path)
    assert f"global_pool: saved with '{pooling}', the model has '{before}'" in said
    assert torch.equal(load_adapter(same, tmp_path).eval()(images(family)), model.eval()(images(family)))
    load_adapter(make(family), tmp_path, ignore_backbone_hash=True)
    description = json.loads((tmp_path / CONFIG).read_text())
    del description["backbone"]["global_pool"]
    (tmp_path / CONFIG).write_text(json.dumps(description))
    load_adapter(make(family), tmp_path)  # as files of earlier versions


@torch.no_grad()
def test_another_precision_is_named(tmp_path: Path) -> None:
    save_adapter(trained(), tmp_path)
    with pytest.raises(BackboneMismatchError, match="dtype: saved with 'float32', the model has 'float64'"):
        load_adapter(make().double(), tmp_path)
    model = load_adapter(make().double(), tmp_path, ignore_backbone_hash=True)
    torch.testing.assert_close(model(images().double()).float(), trained()(images()), rtol=1e-4, atol=1e-4)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    assert "does not exist" in refused(make(), tmp_path / "nowhere")
    save_adapter(trained(), tmp_path)
    config, weights = tmp_path / CONFIG, tmp_path / WEIGHTS
    text, data = config.read_text(), weights.read_bytes()

    config.unlink()
    assert CONFIG in refused(make(), tmp_path)
    for content, message in (
        ("{", "damaged: not JSON"),
        ("[]", "expected a JSON object, got list"),
        (text.replace('"format": 1', '"format": 2'), "format: expected 1, got 2"),
        (text.replace('"bottleneck"', '"bottelneck"'), "'bottelneck': no such option"),
        (text.replace('"format"', '"merge_rule": "jigsaw", "format"'), "'merge_rule': no such entry; expected"),
        (text.replace('"bottleneck": 4', '"bottleneck": 5'), "expected shape [5, 48], got [4, 48]"),
        (text.replace('"layers": null', '"layers": [0]'), "does not fit its configuration"),
    ):
        config.write_text(content)
        assert message in refused(make(), tmp_path)
    config.write_text(text)

    weights.unlink()
    assert WEIGHTS in refused(make(), tmp_path)
    flipped = bytearray(data)
    flipped[-5] ^= 1
    for content, message in ((data[:-10], "damaged"), (b"", "damaged"), (bytes(flipped), "SHA-256 differs")):
        weights.write_bytes(content)
        assert message in refused(make(), tmp_path)
    weights.write_bytes(data)
    load_adapter(make(), tmp_path)


@torch.no_grad()
def test_an_interrupted_save_leaves_an_adapter_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text("kept")
    first, x = trained(), images()
    save_adapter(first, tmp_path)
    second = trained(scale=0.5)

    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(_weights, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        save_adapter(second, tmp_path)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "metrics.jsonl"}
    with pytest.warns(UserWarning, match="belongs to another save"):
        loaded = load_adapter(make(), tmp_path)
    assert torch.equal(loaded(x), first(x))
    save_adapter(second, tmp_path)
    assert torch.equal(load_adapter(make(), tmp_path)(x), second(x))
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one with adapters"):
        save_adapter(make(), tmp_path)
    with pytest.raises(ValueError, match="expected one of 'default', got 'other'"):
        save_adapter(trained(), tmp_path, "other")
    with pytest.raises(ValueError, match="meta device"):
        save_adapter(trained().to("meta"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert issubclass(AdapterFileError, ValueError)


@pytest.mark.parametrize("options", [{"style": "lora"}, {"expert_bias": False}, {"style": "lora", "sparse": "down"}])
def test_an_edited_number_of_experts_is_named(options: dict, tmp_path: Path) -> None:
    save_adapter(inject_adapter(make(), MoSAConfig(bottleneck=4, **options)), tmp_path)
    path = tmp_path / "adapter_config.json"
    description = json.loads(path.read_text())
    description["config"]["num_experts"] = 2
    path.write_text(json.dumps(description))
    assert "num_experts: the configuration has 2, the split adapters.blocks.0." in (
        message := refused(make(), tmp_path)
    )
    assert message.endswith("assignment names expert 3")


def test_what_is_no_path_is_named() -> None:
    for wrong in (None, 3):
        for function in (save_adapter, load_adapter):
            with pytest.raises(TypeError, match=f"directory: expected a path, got {type(wrong).__name__}"):
                function(trained(), wrong)  # type: ignore[arg-type]


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    model, path = inject_adapter(make(), MoSAConfig(bottleneck=4)), tmp_path / "file"
    path.write_text("mine")
    for place in (path, path / "below"):
        with pytest.raises(
            NotADirectoryError, match=r"directory: expected a directory, or a place for one, got .*file"
        ):
            save_adapter(model, place)
    assert path.read_text() == "mine"
    with pytest.raises(
        NotADirectoryError, match=r"directory: expected one that save_adapter wrote, got .*file, a file"
    ):
        load_adapter(make(), path)
