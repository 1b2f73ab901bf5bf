from __future__ import annotations

import io

import pytest
import torch
from timm_models import FAMILIES, SWIN, VIT, Family, images, make, train_a_little
from torch import nn

from mosa_kernels.nn.dense import DenseAdapter
from mosa_kernels.peft import (
    MoSAConfig,
    UnknownModelError,
    adapter_names,
    inject_adapter,
    merge_and_unload,
    set_adapter,
)
from mosa_kernels.peft.book import book_of
from mosa_kernels.peft.placement import find_blocks
from mosa_kernels.peft.plain import Branch, ParallelAdapter, SequentialAdapter

OURS = (DenseAdapter, Branch, ParallelAdapter, SequentialAdapter)


def is_plain(model: nn.Module) -> bool:
    foreign = [m for m in model.modules() if type(m).__module__.startswith("mosa_kernels") and not isinstance(m, OURS)]
    return not foreign and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_merging_changes_nothing_and_leaves_plain_modules(family: Family) -> None:
    x = images(family)
    for style in family.styles:
        model = inject_adapter(make(family), MoSAConfig(style=style, bottleneck=4))
        train_a_little(model)
        before = model(x)
        assert merge_and_unload(model) is model
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert is_plain(model)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "dense", "norm": False},
        {"mode": "pruned"},
        {"sparse": "both", "expert_bias": False},
        {"sparse": "down", "merge_rule": "jigsaw"},
        {"merge_rule": "jigsaw"},
        {"expert_scale": "N", "learnable_scale": True},
        {"layers": (1,), "activation": "relu"},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_option_merges(options: dict) -> None:
    model, x = inject_adapter(make(), MoSAConfig(bottleneck=5, **options)), images()
    train_a_little(model)
    before = model(x)
    torch.testing.assert_close(merge_and_unload(model)(x), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_rule_asked_for_decides() -> None:
    def merged(rule: str | None, config_rule: str) -> torch.Tensor:
        model = inject_adapter(make(), MoSAConfig(bottleneck=4, merge_rule=config_rule))
        train_a_little(model)
        return merge_and_unload(model, rule)(images())

    mean, jigsaw = merged(None, "mean"), merged(None, "jigsaw")
    assert not torch.allclose(mean, jigsaw, atol=1e-3)
    assert torch.equal(merged("mean", "jigsaw"), mean)
    assert torch.equal(merged("jigsaw", "mean"), jigsaw)
    with pytest.raises(ValueError, match="rule: expected None or one of mean, jigsaw, got 'sum'"):
        merged("sum", "mean")
    with pytest.raises(ValueError, match="model: expected one with adapters"):
        merge_and_unload(make())


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
@torch.no_grad()
def test_a_merged_model_exports_traces_and_saves(family: Family) -> None:
    model, x = inject_adapter(make(family), MoSAConfig(bottleneck=4)), images(family)
    train_a_little(model)
    merge_and_unload(model)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    if family is VIT:
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_the_merged_model_belongs_to_its_owner_again() -> None:
    model = make()
    model.cls_token.requires_grad_(False)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    merge_and_unload(inject_adapter(model, MoSAConfig(bottleneck=4)))
    moved = {name.replace("mlp.branch.", "") for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in moved if ".adapter." not in name} == trainable
    assert model.train().blocks[0].training


@torch.no_grad()
def test_one_of_several_is_merged_with_its_head() -> None:
    model, x = inject_adapter(make(), MoSAConfig(bottleneck=4), "a"), images()
    inject_adapter(model, MoSAConfig(bottleneck=3), "b", num_classes=4)
    for name in ("a", "b"):
        train_a_little(model, name)
    before = set_adapter(model, "a")(x)
    set_adapter(model, "b")
    assert adapter_names(model) == ["a", "b"]
    merge_and_unload(model, adapter_name="a")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_a_merged_model_takes_adapters_and_merges_again(family: Family) -> None:
    model, x = make(family), images(family)
    if merge_keeps_no_block(model):
        pytest.skip("the adapter stands beside the whole block, whose place it takes as it merges")
    for _ in range(3):
        before = model(x)
        inject_adapter(model, MoSAConfig(bottleneck=4))
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        train_a_little(model)
        before = model(x)
        torch.testing.assert_close(merge_and_unload(model)(x), before, rtol=1e-5, atol=1e-5)


def test_blocks_in_which_an_adapter_was_merged_whole_are_named() -> None:
    family = next(family for family in FAMILIES if merge_keeps_no_block(make(family)))
    model = merge_and_unload(inject_adapter(make(family), MoSAConfig(bottleneck=4)))
    before = model(images(family))
    with pytest.raises(UnknownModelError, match=r"an adapter was merged around the block at blocks\.0 before"):
        inject_adapter(model, MoSAConfig(bottleneck=4))
    assert torch.equal(model(images(family)), before)


def test_low_rank_updates_find_no_projections_where_an_adapter_was_merged_around_attention() -> None:
    model = merge_and_unload(inject_adapter(make(), MoSAConfig(style="houlsby", bottleneck=4)))
    with pytest.raises(ValueError, match=r"'q' of Block at blocks\.0: an adapter was merged around"):
        inject_adapter(model, MoSAConfig(style="lora", bottleneck=4))


def merge_keeps_no_block(model: nn.Module) -> bool:
    return find_blocks(model)[0].kind.branch == ("",)


@torch.no_grad()
def test_half_precision_says_what_rounding_did() -> None:
    model, x = inject_adapter(make().bfloat16(), MoSAConfig(bottleneck=4)), images().bfloat16()
    train_a_little(model)
    before = model(x)
    with pytest.warns(UserWarning, match=r"merged into torch.bfloat16: rounding moves an entry .* at most \d"):
        merge_and_unload(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    difference = (model(x) - before).float().norm() / before.float().norm()
    assert difference < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_adapters_in_float32_merge_into_the_dtype_of_their_block(dtype: torch.dtype) -> None:
    model, x = make().to(dtype), images().to(dtype)
    inject_adapter(model, MoSAConfig(bottleneck=4))
    for _, _, adapter in book_of(model).adapters("default"):
        adapter.float()
    train_a_little(model)
    before = model(x)
    with pytest.warns(UserWarning, match=f"merged into {dtype}"):
        merge_and_unload(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
