"""Adapters that do not run have no say in which experts can be asked for."""

from __future__ import annotations

import pytest
import torch
from timm_models import images, make, train_a_little
from torch import nn

import mosa_kernels as mk
from mosa_kernels.nn.sampler import samplers
from mosa_kernels.train.evaluate import number_of_experts


def named(**experts: int) -> nn.Module:
    """A model with an adapter of each name, the last one active; one expert is a dense adapter."""
    model = make()
    for name, count in experts.items():
        options = {"mode": "dense"} if count == 1 else {"num_experts": count, "expert_bias": False}
        mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4, **options), name)  # type: ignore[arg-type]
        train_a_little(model, name)
    return model


@torch.no_grad()
def test_the_active_adapter_says_which_experts_there_are() -> None:
    model, x = named(two=2, four=4), images(batch=4)
    with mk.experts_per_sample(model, [0, 1, 2, 3]):
        mixed = model(x)
    for expert in range(4):
        with mk.inference_experts(model, expert):
            torch.testing.assert_close(model(x)[expert], mixed[expert], rtol=1e-4, atol=1e-4)
    mk.set_adapter(model, "two")
    with (
        pytest.raises(ValueError, match="experts: expected 0 to 1, or -1 for the merged adapter"),
        mk.experts_per_sample(model, 2),
    ):
        pass
    with pytest.raises(ValueError, match="number from 0 to 1, got 2"), mk.inference_experts(model, 2):
        pass


@torch.no_grad()
def test_adapters_at_rest_lend_no_experts_to_others() -> None:
    model, x = named(four=4, dense=1), images()
    assert number_of_experts(model) == 1
    with (
        pytest.raises(ValueError, match="expected adapters with more than one expert"),
        mk.experts_per_sample(model, 0),
    ):
        pass
    with pytest.raises(ValueError, match=r"inference: expected .* from 0 to 0, got 1"), mk.inference_experts(model, 1):
        pass
    mk.set_adapter(model, "four")
    with mk.disable_adapter(model):
        assert samplers(model) == []
        with pytest.raises(ValueError, match="model: expected adapters"), mk.inference_experts(model, 1):
            pass
        with mk.inference_experts(model, None):
            model(x)
    assert number_of_experts(model) == 4


@torch.no_grad()
def test_the_routed_adapters_are_those_that_run() -> None:
    model, x = named(two=2, three=3, four=4), images()
    with mk.adapters_per_sample(model, ["four", "three"]):
        assert number_of_experts(model) == 4
        with mk.experts_per_sample(model, 2):
            routed = model(x)
        with pytest.raises(ValueError, match="experts: expected 0 to 2"), mk.experts_per_sample(model, 3):
            pass
    for row, name in enumerate(("four", "three")):
        with mk.inference_experts(mk.set_adapter(model, name), 2):
            torch.testing.assert_close(model(x)[row], routed[row], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_low_rank_adapter_in_the_weights_is_at_rest() -> None:
    model = mk.inject_adapter(make(), mk.MoSAConfig(style="lora", bottleneck=4))
    mk.merge_adapter(model)
    with pytest.raises(ValueError, match="expected adapters with more than one"), mk.experts_per_sample(model, 0):
        pass
    mk.unmerge_adapter(model)
    with mk.experts_per_sample(model, 0):
        pass


@torch.no_grad()
def test_whoever_is_switched_to_within_a_context_runs_these_experts_too() -> None:
    model, x = named(two=2, four=4), images()
    for context in (mk.inference_experts, mk.experts_per_sample):
        mk.set_adapter(model, "four")
        with context(model, 1):
            mk.set_adapter(model, "two")
            switched = model(x)
        with context(model, 1):
            assert torch.equal(model(x), switched)
        assert not torch.equal(model(x), switched)
        mk.set_adapter(model, "four")
        with context(model, 3):
            mk.set_adapter(model, "two")
            with pytest.raises(ValueError, match=r"expected .*0 to 1, .*got \[?3"):
                model(x)
