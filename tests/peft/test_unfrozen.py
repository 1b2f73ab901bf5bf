"""Parts of the backbone that somebody unfreezes after the adapters came: counted, saved, and restored exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from timm_models import images, make, train_a_little
from torch import nn

from mosa_kernels.peft import (
    AdapterFileError,
    BackboneMismatchError,
    MoSAConfig,
    adapters_per_sample,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_adapter,
)

OPTIONS = [{}, {"style": "lora"}, {"method": "bitfit"}, {"method": "full"}, {"method": "linear"}]


def unfrozen(**options: object) -> nn.Module:
    """The patch embedding and the last norm have trained as well."""
    model = inject_adapter(make(), MoSAConfig(bottleneck=4, **options), "a")  # type: ignore[arg-type]
    train_a_little(model, "a")
    for part in (model.patch_embed, model.norm):
        part.requires_grad_(True)
    with torch.no_grad():
        for parameter in (*model.patch_embed.parameters(), *model.norm.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_count_is_what_takes_gradients(options: dict, tmp_path: Path) -> None:
    model = unfrozen(**options)
    save_adapter(model, tmp_path)
    parts = [*model.patch_embed.named_parameters(), *model.norm.named_parameters()]
    taken = {"full": 0, "bitfit": sum(p.numel() for n, p in parts if n.endswith("weight"))}
    expected = taken.get(str(options.get("method")), sum(p.numel() for _, p in parts))
    for each in (model, load_adapter(make(), tmp_path)):
        count = trainable_parameters(each)
        assert count.total == sum(p.numel() for p in each.parameters() if p.requires_grad)
        assert count.unfrozen == expected
        assert count.backbone == sum(p.numel() for p in make(num_classes=0).parameters())
        assert ("backbone (unfrozen)" in str(count), "backbone (frozen)" in str(count)) == (expected > 0, False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_what_was_unfrozen_comes_back_on_the_original_backbone(options: dict, tmp_path: Path) -> None:
    model, x = unfrozen(**options), images()
    save_adapter(model, tmp_path / "first")
    loaded = load_adapter(make(), tmp_path / "first")
    assert torch.equal(loaded(x), model(x))
    assert trainable(loaded) == trainable(model)
    save_adapter(loaded, tmp_path / "second")
    again = load_adapter(make(), tmp_path / "second")
    assert torch.equal(again(x), model(x))
    with disable_adapter(loaded):
        assert torch.equal(loaded(x), make()(x)), "the backbone is as it was"
    assert torch.equal(loaded(x), model(x))
    torch.testing.assert_close(merge_and_unload(again)(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(delete_adapter(loaded, "a")(x), make()(x))


@torch.no_grad()
def test_beside_another_adapter(tmp_path: Path) -> None:
    model, x = unfrozen(), images()
    save_adapter(model, tmp_path)
    both = inject_adapter(make(), MoSAConfig(bottleneck=3), "b")
    train_a_little(both, "b")
    before = both(x)
    load_adapter(both, tmp_path)
    assert torch.equal(both(x), model(x))
    assert torch.equal(set_adapter(both, "b")(x), before)
    assert not {"patch_embed.proj.weight", "norm.weight"} & trainable(both)
    assert torch.equal(set_adapter(both, "a")(x), model(x))
    with (
        pytest.raises(ValueError, match="'a' has parameters of the backbone of its own"),
        adapters_per_sample(both, ["a", "b"]),
    ):
        pass


@torch.no_grad()
def test_a_model_that_goes_on_training_takes_the_values_in_place(tmp_path: Path) -> None:
    model, x = unfrozen(), images()
    save_adapter(model, tmp_path)
    resumed = unfrozen()
    weight = resumed.patch_embed.proj.weight
    assert torch.equal(load_adapter(resumed, tmp_path)(x), model(x))
    assert weight is resumed.patch_embed.proj.weight
    frozen = inject_adapter(make(), MoSAConfig(bottleneck=4), "a")
    assert torch.equal(load_adapter(frozen, tmp_path)(x), model(x))


@torch.no_grad()
def test_saved_while_low_rank_updates_are_in_the_weights(tmp_path: Path) -> None:
    model, x = unfrozen(style="lora"), images()
    model.blocks[0].attn.qkv.weight.requires_grad_(True)
    model.blocks[0].attn.qkv.weight.mul_(0.5)
    expected = model(x)
    merge_adapter(model)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make(), tmp_path / "a")
    assert torch.equal(loaded(x), expected)
    merge_adapter(loaded)
    save_adapter(loaded, tmp_path / "b")
    assert torch.equal(load_adapter(make(), tmp_path / "b")(x), expected)
    assert torch.equal(unmerge_adapter(loaded)(x), expected)


@torch.no_grad()
def test_the_rest_of_the_backbone_has_to_agree(tmp_path: Path) -> None:
    save_adapter(unfrozen(), tmp_path)
    other = make()
    other.blocks[0].norm1.weight[0] += 1e-3
    with pytest.raises(BackboneMismatchError, match="hash of the weights"):
        load_adapter(other, tmp_path)
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    description = json.loads(text)
    assert description["backbone"]["unfrozen"] == [
        "norm.bias",
        "norm.weight",
        "patch_embed.proj.bias",
        "patch_embed.proj.weight",
    ]
    for names, message in (("norm.bias", "expected a list of names"), (["norm.bias"], "hash of the weights")):
        description["backbone"]["unfrozen"] = names
        config.write_text(json.dumps(description))
        model = make()
        with pytest.raises((AdapterFileError, BackboneMismatchError), match=message):
            load_adapter(model, tmp_path)
        assert not hasattr(model, "mosa")
    with pytest.raises(AdapterFileError, match=r"unexpected .*tuned\.norm\.weight"):
        load_adapter(model, tmp_path, ignore_backbone_hash=True)
    assert torch.equal(model(images()), make()(images()))
