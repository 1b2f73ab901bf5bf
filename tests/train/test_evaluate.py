"""Inference mechanisms against their definitions, on a model small enough to enumerate."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.sampler import inference_experts
from mosa_kernels.train.evaluate import Predictions, evaluate, merged_by, number_of_experts, predict, warn_of_merge_loss

EXPERTS = 3


class Tiny(nn.Module):
    """One adapter and a head: tokens [B, 1, 6] to logits [B, 4]."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__()
        self.adapter = FusedMoSAAdapter(6, bottleneck=5, num_experts=experts, scale=1.0, expert_per="sample")
        self.head = nn.Linear(6, 4)
        nn.init.normal_(self.adapter.up.weight)
        nn.init.normal_(self.adapter.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapter(x)[:, 0])


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 1, 6), torch.randint(4, (n,))) for n in (8, 8, 3)]


def test_accuracy_and_likelihood_are_their_definitions():
    logits, labels = torch.randn(7, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = Predictions(logits, labels)
    p = torch.softmax(logits.double(), 1)
    assert found.nll == pytest.approx(-sum(math.log(p[i, y]) for i, y in enumerate(labels.tolist())) / 7)
    assert found.accuracy == pytest.approx(100 * sum(int(p[i].argmax() == y) for i, y in enumerate(labels)) / 7)


def test_mechanisms_are_their_definitions(batches: list[tuple[Tensor, Tensor]]):
    model = Tiny()
    results = evaluate(model, batches, ("merged", "fixed", "ensemble", "stochastic"), seed=3)
    assert set(results) == {"mean", "jigsaw", "fixed", "fixed 0", "fixed 1", "fixed 2", "ensemble", "stochastic"}
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    model.eval()
    with torch.no_grad():
        for rule in ("mean", "jigsaw"):
            logits = model.head((model.adapter.merge(rule)(x))[:, 0])
            assert results[rule]["nll"] == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-5)
        singles = []
        for expert in range(EXPERTS):
            singles.append(model.head(model.adapter(x, expert=expert)[:, 0]))
            expected = F.cross_entropy(singles[-1].double(), y).item()
            assert results[f"fixed {expert}"]["nll"] == pytest.approx(expected, rel=1e-5)
        ensemble = torch.stack(singles).mean(0)
    assert results["ensemble"]["nll"] == pytest.approx(F.cross_entropy(ensemble.double(), y).item(), rel=1e-5)
    average = sum(results[f"fixed {e}"]["nll"] for e in range(EXPERTS)) / EXPERTS
    assert results["fixed"]["nll"] == pytest.approx(average)


def test_stochastic_inference_is_seeded_and_leaves_the_generator_alone(batches: list[tuple[Tensor, Tensor]]):
    model = Tiny()
    before = torch.get_rng_state()
    first = evaluate(model, batches, ("stochastic",), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluate(model, batches, ("stochastic",), seed=1) == first
    assert any(evaluate(model, batches, ("stochastic",), seed=s) != first for s in range(2, 6))


def test_the_model_is_left_as_it_was(batches: list[tuple[Tensor, Tensor]]):
    model = Tiny()
    model.train()
    evaluate(model, batches, ("merged", "fixed"))
    assert model.training
    assert model.adapter.merge_rule == "mean"
    assert model.adapter.sampler.inference is None
    with pytest.raises(ZeroDivisionError), merged_by(model, "jigsaw"):
        raise ZeroDivisionError
    assert model.adapter.merge_rule == "mean"


def test_a_model_without_experts_has_one_mechanism(batches: list[tuple[Tensor, Tensor]]):
    model = Tiny(experts=1)
    assert number_of_experts(model) == 1
    assert set(evaluate(model, batches, ("merged", "stochastic", "fixed"))) == {"plain"}


def test_an_expert_in_the_model_is_what_inference_experts_chooses(batches: list[tuple[Tensor, Tensor]]):
    model = Tiny().eval()
    with inference_experts(model, 1):
        logits = predict(model, batches).logits
    expected = torch.cat([model.head(model.adapter(x, expert=1)[:, 0]) for x, _ in batches])
    torch.testing.assert_close(logits, expected.detach())


class Layers(nn.Module):
    """An adapter of so many experts after the other, and a head: tokens [B, 1, 6] to logits [B, 4]."""

    def __init__(self, *experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Tiny(count).adapter for count in experts)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x) if expert is None or layer.num_experts == 1 else layer(x, expert=expert)
        return self.head(x[:, 0])


def test_layers_may_differ_in_their_experts(batches: list[tuple[Tensor, Tensor]]):
    """A dense layer among them runs as it is, and a single expert is one that all the others have."""
    model = Layers(3, 1, 2).eval()
    found = evaluate(model, batches, ("fixed", "ensemble"))
    assert {"fixed 0", "fixed 1", "fixed", "ensemble"} == set(found)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    with torch.no_grad():
        singles = [model(x, expert) for expert in range(2)]
    for expert, logits in enumerate(singles):
        expected = F.cross_entropy(logits.double(), y).item()
        assert found[f"fixed {expert}"]["nll"] == pytest.approx(expected, rel=1e-5)
    ensemble = F.cross_entropy(torch.stack(singles).mean(0).double(), y).item()
    assert found["ensemble"]["nll"] == pytest.approx(ensemble, rel=1e-5)
    with pytest.raises(ValueError, match="0 to 1"), inference_experts(model, 2):
        pass


def test_bad_requests_are_named(batches: list[tuple[Tensor, Tensor]]):
    with pytest.raises(ValueError, match="inference: expected some of merged, stochastic, fixed, ensemble, got best"):
        evaluate(Tiny(), batches, ("merged", "best"))
    with pytest.raises(ValueError, match="rule: expected one of mean, jigsaw, got 'sum'"):
        evaluate(Tiny(), batches, ("merged",), rules=("sum",))
    with pytest.raises(ValueError, match="expected at least one batch, got none"):
        predict(Tiny(), [])


def test_a_merge_that_loses_much_is_said():
    results = {"mean": {"accuracy": 60.0}, "stochastic": {"accuracy": 66.0}}
    assert "merging by mean loses 6.0 points against stochastic" in (warn_of_merge_loss(results, "mean") or "")
    assert warn_of_merge_loss({"mean": {"accuracy": 65.0}, "stochastic": {"accuracy": 66.0}}, "mean") is None
    assert warn_of_merge_loss({"plain": {"accuracy": 65.0}}, "plain") is None
