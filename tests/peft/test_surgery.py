"""Models that lose blocks, norms or heads after adapters came."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from timm_models import FAMILIES, SWIN, VIT, Family, images, make, train_a_little
from torch import Tensor, nn

import mosa_kernels as mk
from mosa_kernels.peft import set_adapter

DEEPER = VIT._replace(kwargs={**VIT.kwargs, "depth": 4})
PARALLEL = next(family for family in FAMILIES if "_xp_" in family.name)
OPTIONS = [
    {},
    {"style": "lora"},
    {"style": "houlsby", "layers": (0, -1)},
    {"method": "full"},
    {"method": "bitfit"},
    {"method": "vpt-deep"},
]


def pruned(family: Family, *, prune_norm: bool = False, prune_head: bool = False, **options: object) -> nn.Module:
    """With an adapter of these options, one at rest, and as many blocks as its first tap needs."""
    model = mk.inject_adapter(make(family), mk.MoSAConfig(bottleneck=4), "rests")
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4, **options), "runs")  # type: ignore[arg-type]
    for name in ("rests", "runs"):
        train_a_little(model, name)
    model.prune_intermediate_layers([0], prune_norm=prune_norm, prune_head=prune_head)
    return model


def tokens(model: nn.Module, family: Family) -> Tensor:
    return model.forward_features(images(family))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_left_counts_trains_switches_and_merges(options: dict, norm: bool, tmp_path: Path) -> None:
    model = pruned(DEEPER, prune_norm=norm, **options)
    assert len(model.blocks) == 1
    before = tokens(model, DEEPER)
    assert mk.trainable_parameters(model).total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    out = mk.two_pass(model.train(), images(DEEPER))
    assert (out.depth, out.blocks, len(out.features1)) == (1, (0,), 1)
    out.logits1.sum().backward()
    model.eval()
    mk.save_adapter(model, tmp_path)
    set_adapter(set_adapter(model, "rests"), "runs")
    torch.testing.assert_close(tokens(model, DEEPER), before)
    copied = copy.deepcopy(model)
    if options.get("method") != "vpt-deep":
        torch.testing.assert_close(tokens(mk.merge_and_unload(copied), DEEPER), before, rtol=1e-4, atol=1e-4)
    if "layers" not in options and not norm:
        fresh = make(DEEPER)
        fresh.prune_intermediate_layers([0], prune_head=False)
        torch.testing.assert_close(tokens(mk.load_adapter(fresh, tmp_path), DEEPER), before)


def test_stages_of_a_swin_without_its_head() -> None:
    model = pruned(SWIN, prune_norm=True, prune_head=True)  # timm 1.0.21 would keep the norm of the last stage's width
    before = tokens(model, SWIN)
    assert mk.trainable_parameters(model).head == 0
    assert mk.two_pass(model.train(), images(SWIN)).depth == 2
    torch.testing.assert_close(tokens(mk.merge_and_unload(model.eval()), SWIN), before, rtol=1e-4, atol=1e-4)


def test_low_rank_adapters_come_out_of_what_is_left() -> None:
    model = mk.inject_adapter(make(DEEPER), mk.MoSAConfig(style="lora", bottleneck=4))
    train_a_little(model)
    mk.merge_adapter(model)
    model.prune_intermediate_layers([1], prune_head=False)
    merged = tokens(model, DEEPER)
    torch.testing.assert_close(tokens(mk.unmerge_adapter(model), DEEPER), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [True, (0, 1), (-1,)])
def test_a_block_from_the_middle(features: object) -> None:
    model = mk.inject_adapter(make(DEEPER), mk.MoSAConfig(bottleneck=4))
    del model.blocks[1]
    out = mk.two_pass(model.train(), images(DEEPER), features=features)  # type: ignore[arg-type]
    expected = range(3) if features is True else sorted(index % 3 for index in features)  # type: ignore[attr-defined]
    assert (out.depth, out.blocks) == (3, tuple(expected))
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4), "second")
    assert mk.two_pass(model, images(DEEPER)).depth == 3
    assert mk.merge_and_unload(model)(images(DEEPER)).shape == (2, 10)


def test_a_new_block_is_named() -> None:
    model = mk.inject_adapter(make(DEEPER), mk.MoSAConfig(bottleneck=4))
    model.blocks[2] = make(DEEPER).blocks[0]
    assert mk.trainable_parameters(model).adapter.stored > 0
    with pytest.raises(ValueError, match=r"model: expected the blocks .* got a new one at blocks\.2"):
        mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4), "second")
    assert mk.merge_and_unload(model)(images(DEEPER)).shape == (2, 10)


@pytest.mark.parametrize("family", [VIT, PARALLEL], ids=lambda family: family.name)
def test_a_block_in_two_places(family: Family, tmp_path: Path) -> None:
    def shared() -> nn.Module:
        backbone = make(family)
        backbone.blocks[1] = backbone.blocks[0]
        return backbone

    for style in family.styles:
        model = mk.inject_adapter(shared(), mk.MoSAConfig(style=style, bottleneck=4))
        train_a_little(model)
        expected = model(images(family))
        mk.save_adapter(model, tmp_path)
        assert torch.equal(mk.load_adapter(shared(), tmp_path)(images(family)), expected)
        merged = mk.merge_and_unload(model)
        assert merged.blocks[0] is merged.blocks[1]
        torch.testing.assert_close(merged(images(family)), expected, rtol=1e-4, atol=1e-4)
