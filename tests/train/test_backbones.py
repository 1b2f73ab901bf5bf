"""Backbones by name and by file: what loads, and what is said where something does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.train import backbones
from mosa_kernels.train.backbones import create_backbone, data_config, paper_hint

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def small_vit(num_classes: int = 3) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **SMALL)


def test_the_offline_backbone_comes_with_its_weights_and_a_fresh_head():
    model = create_backbone(OFFLINE_BACKBONE, 7)
    again = create_backbone(OFFLINE_BACKBONE, 7, pretrained=False)
    assert model.get_classifier().out_features == 7
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)


def test_nothing_random_is_left_in_a_swin():
    model = create_backbone("swin_tiny_patch4_window7_224", 3, pretrained=False)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert not any(rates)


def test_a_file_with_another_head_loads(tmp_path: Path):
    source, target = small_vit(5), small_vit(3)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    backbones.load_checkpoint(target, tmp_path / "weights.safetensors")
    assert torch.equal(target.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert target.head.weight.shape == (3, 32)


def test_a_torch_file_loads_without_unpickling_code(tmp_path: Path):
    source, target = small_vit(3), small_vit(3)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    backbones.load_checkpoint(target, tmp_path / "weights.pth")
    assert torch.equal(target.head.weight, source.head.weight)


def test_an_npz_of_the_original_vits_loads(tmp_path: Path):
    """Names and shapes as in the Flax checkpoints that the paper starts from."""
    model, width, heads = small_vit(3), 32, 2
    noise = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return noise.normal(size=shape).astype(np.float32)

    weights = {
        "embedding/kernel": draw(8, 8, 3, width),
        "embedding/bias": draw(width),
        "cls": draw(1, 1, width),
        "Transformer/posembed_input/pos_embedding": draw(1, 17, width),
        "Transformer/encoder_norm/scale": draw(width),
        "Transformer/encoder_norm/bias": draw(width),
    }
    for block in range(2):
        at = f"Transformer/encoderblock_{block}/"
        attention = f"{at}MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            weights[f"{attention}{name}/kernel"] = draw(width, heads, width // heads)
            weights[f"{attention}{name}/bias"] = draw(heads, width // heads)
        weights[f"{attention}out/kernel"] = draw(heads, width // heads, width)
        weights[f"{attention}out/bias"] = draw(width)
        for number, shape in enumerate(((width, 4 * width), (4 * width, width))):
            weights[f"{at}MlpBlock_3/Dense_{number}/kernel"] = draw(*shape)
            weights[f"{at}MlpBlock_3/Dense_{number}/bias"] = draw(shape[1])
        for number in (0, 2):
            weights[f"{at}LayerNorm_{number}/scale"] = draw(width)
            weights[f"{at}LayerNorm_{number}/bias"] = draw(width)
    np.savez(tmp_path / "vit.npz", **weights)
    backbones.load_checkpoint(model, tmp_path / "vit.npz")
    expected = torch.from_numpy(weights["Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"]).T
    assert torch.equal(model.blocks[1].mlp.fc1.weight, expected)


def test_files_that_do_not_fit_are_refused_with_the_first_differences(tmp_path: Path):
    state = small_vit().state_dict()
    state["blocks.7.extra"] = state.pop("blocks.0.norm1.weight")
    state["norm.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(
        ValueError, match=r"missing blocks\.0\.norm1\.weight; unexpected blocks\.7\.extra; norm\.bias \[5\]"
    ):
        backbones.load_checkpoint(small_vit(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match=r"checkpoint other\.npz: it does not fit the model"):
        backbones.load_checkpoint(small_vit(), tmp_path / "other.npz")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file ending in \.safetensors, .* got weights\.h5"):
        backbones.load_checkpoint(small_vit(), tmp_path / "weights.h5")
    with pytest.raises(FileNotFoundError, match="checkpoint: no file"):
        backbones.load_checkpoint(small_vit(), tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_244", "did you mean vit_base_patch16_224"),
        ("vit_base_patch16_224.nonsense", "expected one of the tags .*orig_in21k.* got 'nonsense'"),
        ("", "timm has no ''"),
    ],
)
def test_unknown_names_get_a_hint(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, 3)


def test_weights_out_of_reach_are_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def unreachable(*arguments: object, **keywords: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(backbones.socket, "create_connection", unreachable)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(ConnectionError, match=f"without a network, give a file .* built-in --model {OFFLINE_BACKBONE}"):
        create_backbone("vit_tiny_patch16_224.augreg_in21k", 3)


def test_other_weights_than_the_papers_are_pointed_out():
    assert "orig_in21k" in (paper_hint("vit_base_patch16_224") or "")
    assert "orig_in21k" in (paper_hint("vit_base_patch16_224.augreg_in21k") or "")
    assert paper_hint("vit_base_patch16_224.orig_in21k") is None
    assert paper_hint("deit_base_patch16_224") is None


def test_images_have_the_size_that_was_asked_for():
    model = create_backbone("vit_tiny_patch16_224", 3, pretrained=False, image_size=64)
    assert data_config(model, 64)["input_size"] == (3, 64, 64)
    assert data_config(model)["input_size"] == (3, 224, 224)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [(OFFLINE_BACKBONE, 48), ("swin_tiny_patch4_window7_224", 64), ("pvt_v2_b0", 66), ("sam2_hiera_tiny", 64)],
)
def test_other_sizes_that_fit_just_work(name: str, size: int):
    model = create_backbone(name, 3, pretrained=name == OFFLINE_BACKBONE, image_size=size)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert model.training


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (OFFLINE_BACKBONE, 33, f"image_size: expected a multiple of the patch size 8 of {OFFLINE_BACKBONE}, got 33"),
        ("vit_tiny_patch16_224", 8, "expected a multiple of the patch size 16 of vit_tiny_patch16_224, got 8"),
        ("vit_tiny_patch16_224", 0, "image_size: expected at least 1, got 0"),
        ("gcvit_xxtiny", 20, "gcvit_xxtiny does not take images of 20 pixels"),
    ],
)
def test_sizes_that_a_model_does_not_take_are_named(name: str, size: int, message: str):
    with pytest.raises(ValueError, match=message):
        create_backbone(name, 3, pretrained=False, image_size=size)


def test_a_model_that_takes_no_number_of_classes_is_named(monkeypatch: pytest.MonkeyPatch):
    def headless(pretrained: bool = False) -> torch.nn.Module:
        return torch.nn.Identity()

    monkeypatch.setattr(timm, "create_model", lambda name, **options: headless(**options))
    with pytest.raises(
        ValueError, match=r"vit_tiny_patch16_224: timm does not take {'num_classes': 3, .*} for it .*argument"
    ):
        create_backbone("vit_tiny_patch16_224", 3, pretrained=False, image_size=32)


def test_a_model_that_fails_at_a_size_is_named(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("too small")

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward", fail)
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 does not take images of 32 pixels \(too small\)"):
        create_backbone("vit_tiny_patch16_224", 3, pretrained=False, image_size=32)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("suffix", backbones.SUFFIXES)
def test_a_damaged_file_is_named(suffix: str, content: bytes, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*weights\.\w+: (cannot be read|it does not fit the model) \("):
        backbones.load_checkpoint(small_vit(), path)
