"""One expert of a whole model: run by name, and merged into plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from timm_models import SWIN, VIT, Family, images, make, train_a_little

import mosa_kernels as mk
from mosa_kernels.peft import active_adapter


@pytest.mark.parametrize("style", ["adaptformer", "pfeiffer", "houlsby", "lora"])
@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
@torch.no_grad()
def test_one_expert_merges_into_what_it_computed(family: Family, style: str) -> None:
    x = images(family)
    model = mk.inject_adapter(make(family), mk.MoSAConfig(style=style, bottleneck=4, num_experts=3, expert_scale=2.0))
    train_a_little(model)
    outputs = []
    for expert in range(3):
        with mk.experts_per_sample(model, expert):
            outputs.append(model(x))
        merged = mk.merge_and_unload(copy.deepcopy(model), expert=expert)
        torch.testing.assert_close(merged(x), outputs[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    with mk.experts_per_sample(model, [2, 0]):
        mixed = model(x[:2])
    torch.testing.assert_close(mixed, torch.stack([outputs[2][0], outputs[0][1]]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_low_rank_experts_fold_and_come_back() -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(style="lora", bottleneck=4)), images()
    train_a_little(model)
    with mk.experts_per_sample(model, 1):
        expected = model(x)
    before = model(x)
    mk.merge_adapter(model, expert=1)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mk.unmerge_adapter(model)(x), before)


@pytest.mark.parametrize("style", ["adaptformer", "lora"])
@torch.no_grad()
def test_an_adapter_of_one_expert_among_others_merges_whole(style: str) -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(style=style, bottleneck=4, num_experts=(3, 1))), images()
    train_a_little(model)
    with mk.inference_experts(model, 2):
        expected = model(x)
    with pytest.raises(ValueError, match="expert: expected a number from 0 to 2, got 3"):
        mk.merge_and_unload(model, expert=3)
    torch.testing.assert_close(mk.merge_and_unload(model, expert=2)(x), expected, rtol=1e-5, atol=1e-5)


def test_two_passes_train_the_named_expert_alone() -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(bottleneck=4, expert_per="batch")).train(), images()
    with mk.experts_per_sample(model, torch.full((len(x),), 2)):
        out = mk.two_pass(model, x, features=False)
    (out.logits1 + out.logits2).square().sum().backward()
    layers = [module for module in model.modules() if isinstance(module, mk.FusedMoSAAdapter)]
    for layer in layers:
        assert layer.up.weight.grad[layer.up.assignment != 2].eq(0).all()
        assert layer.up.weight.grad[layer.up.assignment == 2].ne(0).any()


def test_what_cannot_be() -> None:
    model = mk.inject_adapter(make(), mk.MoSAConfig(bottleneck=4))
    with pytest.raises(ValueError, match="rule, expert: expected one of them, got 'mean' and 1"):
        mk.merge_and_unload(model, "mean", expert=1)
    with pytest.raises(ValueError, match="expert: expected a number from 0 to 3, got 4"):
        mk.merge_and_unload(model, expert=4)
    for wrong in (True, 1.0, [1], "1"):
        with pytest.raises(TypeError, match="expert: expected a number from 0 to 3, got"):
            mk.merge_and_unload(model, expert=wrong)  # type: ignore[arg-type]
    lora = mk.inject_adapter(make(), mk.MoSAConfig(style="lora", bottleneck=4))
    with pytest.raises(ValueError, match="expert: expected a number from 0 to 3, got -1"):
        mk.merge_adapter(lora, expert=-1)
    linear = mk.inject_adapter(make(), mk.MoSAConfig(method="linear"))
    with pytest.raises(ValueError, match="expert: expected None for 'linear', which has no experts, got 0"):
        mk.merge_and_unload(linear, expert=0)


def test_a_merge_that_is_refused_changes_nothing() -> None:
    for style in ("adaptformer", "lora"):
        model = mk.inject_adapter(make(), mk.MoSAConfig(style=style, bottleneck=4), "first")
        mk.inject_adapter(model, mk.MoSAConfig(style=style, bottleneck=4), "second")
        with pytest.raises(ValueError, match="expert: expected"):
            mk.merge_and_unload(model, adapter_name="first", expert=4)
        assert active_adapter(model) == "second"
