"""An expert for each sample, by name: what runs, what trains, and the plain adapter that one expert is."""

from __future__ import annotations

import pytest
import torch
from layers import D, R, layer_oracle, trained_layer
from torch.utils.checkpoint import checkpoint

import mosa_kernels as mk

EXPERTS = [2, 0, -1, 3, 0]
FOUR = [
    {},
    {"sparse": "down", "expert_scale": 2.0},
    {"sparse": "both", "expert_bias": False, "norm": False},
    {"granularity": "row", "activation": "relu", "expert_scale": "N"},
    {"granularity": "column", "learnable_scale": True, "merge_rule": "jigsaw"},
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", FOUR, ids=str)
def test_each_sample_runs_its_expert(options: dict, training: bool) -> None:
    layer = trained_layer(**options).train(training)
    x = torch.randn(len(EXPERTS), 3, D)
    with mk.experts_per_sample(layer, EXPERTS):
        out = layer(x)
    for n, expert in enumerate(EXPERTS):
        expected = layer_oracle(layer, x[n : n + 1], expert, layer.merged_scale)
        torch.testing.assert_close(out[n : n + 1].double(), expected, rtol=1e-5, atol=1e-5)


def test_numbers_are_checked_whatever_the_default_device() -> None:
    layer = trained_layer()
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="experts: expected 0 to 3, or -1"),
        mk.experts_per_sample(layer, [4]),
    ):
        pass


def test_only_the_entries_of_experts_that_ran_get_a_gradient() -> None:
    layer = trained_layer()
    with mk.experts_per_sample(layer, torch.tensor([1, 3, 1])):
        layer(torch.randn(3, 4, D)).square().sum().backward()
    assert layer.up.assignment is not None
    ran = (layer.up.assignment == 1) | (layer.up.assignment == 3)
    assert not layer.up.weight.grad[~ran].any()
    assert layer.up.weight.grad[ran].ne(0).all()
    assert layer.up.bias.grad.ne(0).any(1).tolist() == [False, True, False, True]


def test_it_holds_within_the_context_alone_and_contexts_nest() -> None:
    layer, x = trained_layer().eval(), torch.randn(2, 3, D)
    merged, first, second = layer(x), layer(x, expert=0), layer(x, expert=1)
    with mk.experts_per_sample(layer, 0) as same:
        assert same is layer
        assert torch.equal(layer(x), first)
        with mk.experts_per_sample(layer, [1, 1]):
            assert torch.equal(layer(x), second)
        assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), merged)


@pytest.mark.parametrize("expert_per", ["sample", "batch"])
@pytest.mark.parametrize("anchored", [False, True])
def test_both_passes_run_them(expert_per: str, anchored: bool) -> None:
    layer = mk.FusedMoSAAdapter(D, R, expert_per=expert_per)
    layer.sampler.anchored = anchored
    for experts, samples in (([3, 1], [3, 1]), (2, [2, 2])):
        with mk.experts_per_sample(layer, experts):
            drawn = layer.sampler.draw_passes(7, (0, 1), 4, torch.device("cpu"), True).expert
        assert isinstance(drawn, torch.Tensor)
        per_sample = drawn.repeat_interleave(4 // len(drawn)).tolist()
        assert per_sample == ([-1, -1] if anchored else samples) + samples


def test_activation_checkpointing_within_the_context() -> None:
    layer, x = trained_layer(dropout=0.5), torch.randn(4, 3, D, requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        with mk.experts_per_sample(layer, [0, 1, 2, 3]):
            gradients.append(torch.autograd.grad(run(x).square().sum(), [x, layer.up.weight]))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_what_cannot_be() -> None:
    layer, x = trained_layer(), torch.randn(4, 3, D)
    cases = [
        (4, r"experts: expected 0 to 3, or -1 for the merged adapter, got \[4\]"),
        ([0, -2], r"experts: expected 0 to 3, or -1 for the merged adapter, got \[0, -2\]"),
        ([[0]], r"experts: expected one number or one for each sample, got shape \[1, 1\]"),
    ]
    for experts, message in cases:
        with pytest.raises(ValueError, match=message), mk.experts_per_sample(layer, experts):
            pass
    for wrong in ([0.5], [True], "0", None, ["0"], [[0], [1, 2]]):
        with pytest.raises(TypeError, match="experts: expected integers"), mk.experts_per_sample(layer, wrong):
            pass
    with (
        mk.experts_per_sample(layer, [0, 1]),
        pytest.raises(ValueError, match=r"experts: expected .* 4 samples, got 2"),
    ):
        layer(x)
    for plain in (torch.nn.Linear(2, 2), trained_layer(num_experts=1), trained_layer(pruned=True)):
        with pytest.raises(ValueError, match="adapters with more than one"), mk.experts_per_sample(plain, 0):
            pass


def test_what_is_no_model_is_named() -> None:
    for context in (mk.experts_per_sample, mk.inference_experts):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"), context("layer", 0):
            pass


def test_a_batch_without_samples() -> None:
    layer = trained_layer()
    for none in ([], torch.zeros(0, dtype=torch.int64)):
        with mk.experts_per_sample(layer, none):
            assert layer(torch.randn(0, 3, D)).shape == (0, 3, D)
            with pytest.raises(ValueError, match="expected one for each of the batch's 2 samples, got 0"):
                layer(torch.randn(2, 3, D))


@pytest.mark.parametrize("options", FOUR, ids=str)
@pytest.mark.parametrize("expert", [0, 3])
def test_one_expert_as_a_plain_adapter(options: dict, expert: int) -> None:
    layer, x = trained_layer(**options), torch.randn(5, 3, D)
    expected = layer_oracle(layer, x, expert, layer.merged_scale)
    dense = layer.merge(expert=expert)
    torch.testing.assert_close(dense(x).double(), expected, rtol=1e-5, atol=1e-5)
    for bad in (4, -1):
        with pytest.raises(ValueError, match=f"expert: expected a number from 0 to 3, got {bad}"):
            layer.merge(expert=bad)


def test_vmap_takes_experts_along() -> None:
    layer, x = trained_layer().eval(), torch.randn(2, 3, D)

    def run(expert: torch.Tensor) -> torch.Tensor:
        with mk.experts_per_sample(layer, expert):
            return layer(x)

    for expert, out in enumerate(torch.func.vmap(run)(torch.arange(4))):
        torch.testing.assert_close(out, layer(x, expert=expert))
