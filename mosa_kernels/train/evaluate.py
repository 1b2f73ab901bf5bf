"""Accuracy and likelihood, by each inference mechanism of arXiv 2312.02923, Table 10."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.nn.sampler import inference_experts, samplers

MECHANISMS = ("merged", "stochastic", "fixed", "ensemble")


@dataclass(frozen=True)
class Predictions:
    """Logits float32 [n, classes] and labels int64 [n] of a data set, on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        """Percent of right answers."""
        return 100 * (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the labels, in nats."""
        return F.cross_entropy(self.logits.double(), self.labels).item()

    def as_dict(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "nll": self.nll}


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[Any], accelerator: Accelerator | None = None) -> Predictions:
    """Runs a model in evaluation mode over a data set; leaves its mode as it was.

    Args:
        model: images [B, 3, H, W] -> logits [B, classes].
        loader: of (images, labels).
        accelerator: gathers over processes, where the loader was prepared by it.

    Raises:
        ValueError: the loader is empty.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        for images, labels in loader:
            outputs = model(images.to(device, non_blocking=True)).float(), labels.to(device, non_blocking=True)
            logits, truth = outputs if accelerator is None else accelerator.gather_for_metrics(outputs)
            parts.append((logits.cpu(), truth.cpu()))
    finally:
        model.train(training)
    if not parts:
        raise ValueError("loader: expected at least one batch, got none")
    return Predictions(torch.cat([logits for logits, _ in parts]), torch.cat([labels for _, labels in parts]))


def number_of_experts(model: nn.Module) -> int:
    """How many experts take turns in the model's adapters; 1 where nothing is drawn."""
    counts = {sampler.num_experts for sampler in samplers(model) if sampler.fixed is None}
    return max(counts, default=1)


@contextmanager
def merged_by(model: nn.Module, rule: str) -> Iterator[None]:
    """Within the context, evaluation merges by this rule, whatever the adapters were configured for.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in MERGE_RULES:
        raise ValueError(f"rule: expected one of {', '.join(MERGE_RULES)}, got {rule!r}")
    layers = [module for module in model.modules() if hasattr(module, "merge_rule")]
    before = [layer.merge_rule for layer in layers]
    for layer in layers:
        layer.merge_rule = rule  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.merge_rule = value


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    mechanisms: Iterable[str] = ("merged", "stochastic"),
    *,
    rules: Iterable[str] = MERGE_RULES,
    seed: int = 0,
    accelerator: Accelerator | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy (percent) and negative log-likelihood (nats) by each mechanism.

    Returned by name: "mean" and "jigsaw" (the merged adapter by each rule), "stochastic" (an expert drawn in each
    adapter, once), "fixed 0" ... "fixed N-1" (the same expert in every adapter) with "fixed" their average, and
    "ensemble" (the mean of the N fixed experts' logits); where layers differ in N, of the experts that all have. A
    model that draws no experts has one mechanism, "plain".

    Args:
        model: with adapters.
        loader: of (images, labels).
        mechanisms: some of `MECHANISMS`.
        rules: merge rules for "merged".
        seed: of the stochastic mechanism; the generators' states are left as they were.
        accelerator: see `predict`.

    Raises:
        ValueError: an unknown mechanism.
    """
    chosen = tuple(mechanisms)
    unknown = [name for name in chosen if name not in MECHANISMS]
    if unknown:
        raise ValueError(f"inference: expected some of {', '.join(MECHANISMS)}, got {', '.join(unknown)}")
    experts = number_of_experts(model)
    if experts == 1:
        return {"plain": predict(model, loader, accelerator).as_dict()}
    results: dict[str, dict[str, float]] = {}
    if "merged" in chosen:
        for rule in rules:
            with merged_by(model, rule):
                results[rule] = predict(model, loader, accelerator).as_dict()
    if "stochastic" in chosen:
        with _seeded(seed), inference_experts(model, "stochastic"):
            results["stochastic"] = predict(model, loader, accelerator).as_dict()
    if "fixed" in chosen or "ensemble" in chosen:
        fewest = min(sampler.choices for sampler in samplers(model) if sampler.chooses)
        results |= _by_expert(model, loader, fewest, chosen, accelerator)
    return results


def _by_expert(
    model: nn.Module, loader: Iterable[Any], experts: int, chosen: tuple[str, ...], accelerator: Accelerator | None
) -> dict[str, dict[str, float]]:
    singles: list[Predictions] = []
    for expert in range(experts):
        with inference_experts(model, expert):
            singles.append(predict(model, loader, accelerator))
    results: dict[str, dict[str, float]] = {}
    if "fixed" in chosen:
        rows = {f"fixed {expert}": single.as_dict() for expert, single in enumerate(singles)}
        results["fixed"] = {key: math.fsum(row[key] for row in rows.values()) / experts for key in ("accuracy", "nll")}
        results |= rows
    if "ensemble" in chosen:
        logits = torch.stack([single.logits for single in singles]).mean(0)
        results["ensemble"] = Predictions(logits, singles[0].labels).as_dict()
    return results


def warn_of_merge_loss(results: dict[str, dict[str, float]], rule: str, points: float = 2.0) -> str | None:
    """A sentence where the merged adapter does worse than drawn experts by more than `points` percent."""
    if rule not in results or "stochastic" not in results:
        return None
    loss = results["stochastic"]["accuracy"] - results[rule]["accuracy"]
    if loss <= points:
        return None
    return f"merging by {rule} loses {loss:.1f} points against stochastic inference: these experts do not merge well"
