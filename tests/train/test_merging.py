"""A merged model's weights and the card beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from mosa_kernels.peft import MoSAConfig, inject_adapter
from mosa_kernels.train.backbones import create_backbone, require_known
from mosa_kernels.train.merging import (
    check_merge,
    load_merged,
    merged_card,
    merged_copy,
    require_merged_or_new,
    write_merged,
)
from mosa_kernels.train.settings import Settings

MODEL = "vit_offline_patch8_32"


def written(path: Path) -> nn.Module:
    model = inject_adapter(create_backbone(MODEL, 3, pretrained=False), MoSAConfig(bottleneck=4)).eval()
    merged = merged_copy(model)
    write_merged(merged, path, merged_card(model, Settings(MODEL, "none"), 3, "mean", None))
    return merged


@torch.no_grad()
def test_a_path_may_be_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merged, images = written(tmp_path / "pets.safetensors"), torch.randn(2, 3, 32, 32)
    for path in ("pets.safetensors", Path("pets.safetensors")):
        assert torch.equal(load_merged(path)(images), merged(images))
    with pytest.raises(ValueError, match=r"expected a \.safetensors file, got pets\.bin"):
        load_merged("pets.bin")


@torch.no_grad()
def test_a_merge_that_changes_predictions_or_logits_is_told() -> None:
    model = nn.Linear(4, 3, bias=False)
    nn.init.eye_(model.weight)
    other, close = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    other.weight.copy_(model.weight.roll(1, 0))
    close.weight.copy_(model.weight * (1 + 2e-5))
    loader = [(8 * torch.eye(4)[:3], torch.arange(3))]
    same, rounded, scaled, changed = (
        check_merge(model, merged, loader) for merged in (model, close, nn.Sequential(model, nn.Softplus()), other)
    )
    assert [check.unchanged for check in (same, rounded, scaled, changed)] == [True, True, False, False]
    assert [check.same_predictions for check in (same, rounded, scaled, changed)] == [3, 3, 3, 0]
    assert (changed.largest_difference, changed.largest_logit, changed.images) == (8, 8, 3)
    assert "merging changed nothing" in rounded.sentence()
    assert changed.sentence().startswith(
        "MERGING CHANGED THE MODEL: largest logit difference 8.0e+00 (logits up to 8.0)"
    )
    assert not dataclasses.replace(same, same_predictions=2).unchanged


def test_the_card_of_another_file_is_not_overwritten(tmp_path: Path) -> None:
    written(tmp_path / "pets.safetensors")
    card = (tmp_path / "pets.json").read_bytes()
    require_merged_or_new(tmp_path / "pets.safetensors")
    with pytest.raises(ValueError, match=r"pets\.json is the card of pets\.safetensors and would be lost"):
        require_merged_or_new(tmp_path / "pets.pt2")
    (tmp_path / "pets.safetensors").rename(tmp_path / "pets.pt2")
    with pytest.raises(ValueError, match=r"pets\.json is the card of pets\.pt2 and would be lost"):
        written(tmp_path / "pets.safetensors")
    assert (tmp_path / "pets.json").read_bytes() == card
    require_merged_or_new(tmp_path / "other.pt2")


def test_names_that_go_on_are_offered_first() -> None:
    with pytest.raises(ValueError, match="timm has no 'vit_tiny'; did you mean vit_tiny_patch16_224, vit_tiny_"):
        require_known("vit_tiny")
