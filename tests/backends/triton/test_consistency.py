"""The kernels for cross-entropy and divergence against their formulas in float64, on a GPU or interpreted."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from torch import Tensor
from torch.library import opcheck

from mosa_kernels.functional.consistency import consistency
from mosa_kernels.losses import MoSALoss

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import consistency as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1 (as test_interpreted_operators.py sets it)",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
"""Relative; the interpreter cuts bf16 off where a GPU rounds to nearest."""


def formula(logits1: Tensor, logits2: Tensor, target: Tensor, smoothing: float, detach: bool) -> tuple[Tensor, Tensor]:
    """Both terms of Eq. 6 in float64, from probabilities."""
    classes = logits1.shape[1]
    log1, log2 = (logits - logits.logsumexp(1, keepdim=True) for logits in (logits1, logits2))
    if target.dtype.is_floating_point:
        y, counts = target.double(), torch.ones(len(target), dtype=torch.bool, device=target.device)
    else:
        counts = target.long() != -100
        y = torch.eye(classes, dtype=torch.float64, device=target.device)[target.long().clamp(min=0)]
    y = (1 - smoothing) * y + smoothing / classes
    cross_entropy = -(y * log1)[counts].sum() / counts.sum()
    fixed1, fixed2 = (log1.detach(), log2.detach()) if detach else (log1, log2)
    terms = fixed1.exp() * (fixed1 - log2) + fixed2.exp() * (fixed2 - log1)
    return cross_entropy, terms.sum() / len(logits1)


def check(
    logits1: Tensor, logits2: Tensor, target: Tensor, smoothing: float = 0.0, detach: bool = False,
    weights: tuple[float, float] = (1.0, 0.5), scale: float = 1.0,
) -> None:  # fmt: skip
    leaves = [logits.detach().requires_grad_() for logits in (logits1, logits2)]
    with poisoned_memory():
        found = consistency(*leaves, target, label_smoothing=smoothing, detach_targets=detach, backend="triton")
        (weights[0] * found[0] + weights[1] * found[1]).backward()
    wide = [logits.detach().double().requires_grad_() for logits in (logits1, logits2)]
    expected = formula(*wide, target, smoothing, detach)
    (weights[0] * expected[0] + weights[1] * expected[1]).backward()
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5 * scale, atol=1e-6 * scale)
    for leaf, exact in zip(leaves, wide, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        error = (leaf.grad.double() - exact.grad).abs()
        bound = exact.grad.abs() * (ROUNDING[leaf.dtype] + 2e-5 * scale) + 2e-6 * scale + 2.0**-24
        assert (error <= bound).all(), (error - bound).max()


def targets(kind: str, batch: int, classes: int, generator: torch.Generator) -> Tensor:
    if kind.startswith("soft"):
        soft = torch.rand(batch, classes, generator=generator)  # need not add up to one
        return soft.to(DEVICE, {"soft": torch.float32, "soft16": torch.float16}[kind])
    labels = torch.randint(classes, (batch,), generator=generator)
    return labels.to(DEVICE, {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}[kind])


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(
    batch=st.integers(1, 9),
    classes=st.integers(1, 40),
    kind=st.sampled_from(("int64", "int32", "uint8", "soft", "soft16")),
    spread=st.sampled_from((0.1, 1.0, 8.0)),
    smoothing=st.sampled_from((0.0, 0.1, 1.0)),
    detach=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from(((1.0, 0.5), (0.0, 1.0), (2.0, 0.0))),
    seed=st.integers(0, 2**31),
)
def test_is_the_formula(batch, classes, kind, spread, smoothing, detach, dtype, weights, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    both = (spread * torch.randn(2 * batch, classes, generator=generator)).to(DEVICE, dtype)
    target = targets(kind, batch, classes, generator)
    check(both[:batch], both[batch:], target, smoothing, detach, weights, scale=1 + spread)


@pytest.mark.parametrize("kind", ["int64", "soft"])
@pytest.mark.parametrize(("batch", "classes"), [(3, 5000), (40, 3), (2, 2048)])
def test_several_blocks(kind: str, batch: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BATCH_BLOCK", 16)
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2 * batch, classes, generator=generator).to(DEVICE)
    check(both[:batch], both[batch:], targets(kind, batch, classes, generator), 0.1)


def test_rows_apart_and_columns_apart() -> None:
    wide = torch.randn(4, 30, device=DEVICE)
    target = torch.tensor([0, 3, 9, 1], device=DEVICE)
    check(wide[:, :10], wide[:, 10:20], target)
    check(wide[:, ::3], torch.randn(10, 4, device=DEVICE).t(), target)
    check(wide[:, :10], wide[:, 10:20], torch.arange(8, device=DEVICE)[::2], 0.1)


def test_labels_that_name_no_class() -> None:
    logits = torch.randn(2, 5, 7, device=DEVICE)
    check(logits[0], logits[1], torch.tensor([1, -100, 3, -100, 6], device=DEVICE), 0.1)
    for label in (-1, 7, 2**32):
        wrong = torch.tensor([1, 2, 3, label, 6], device=DEVICE)
        assert consistency(logits[0], logits[1], wrong, backend="triton")[0].isnan()
    ignored = torch.full((5,), -100, device=DEVICE)
    assert consistency(logits[0], logits[1], ignored, backend="triton")[0].isnan()  # as in PyTorch


def test_far_apart_logits_stay_finite() -> None:
    logits = torch.tensor([[60000.0, -60000.0, 0.0]], device=DEVICE).half()
    target = torch.tensor([2], device=DEVICE)
    cross_entropy, same = consistency(logits, logits, target, backend="triton")
    assert cross_entropy == 60000
    assert same == 0
    check(logits, -logits, target)
    masked = torch.tensor([[0.0, float("-inf"), 1.0]], device=DEVICE, requires_grad=True)
    found, _ = consistency(masked, torch.zeros(1, 3, device=DEVICE), target, backend="triton")
    expected = torch.nn.functional.cross_entropy(masked, target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("only", [0, 1])
def test_only_what_is_asked_for(only: int) -> None:
    logits = [torch.randn(3, 4, device=DEVICE, requires_grad=index == only) for index in range(2)]
    wide = [logit.detach().double().requires_grad_(index == only) for index, logit in enumerate(logits)]
    target = torch.tensor([0, 1, 2], device=DEVICE)
    losses = consistency(*logits, target, backend="triton")
    for loss, expected in zip(losses, formula(*wide, target, 0.0, False), strict=True):
        (found,) = torch.autograd.grad(loss, logits[only], retain_graph=True)
        slope = torch.zeros_like(wide[only])
        if expected.requires_grad:
            (slope,) = torch.autograd.grad(expected, wide[only], retain_graph=True)
        torch.testing.assert_close(found.double(), slope, rtol=1e-5, atol=1e-6)


class Output(NamedTuple):
    logits1: Tensor
    logits2: Tensor
    features1: list[Tensor]
    features2: list[Tensor]


def test_second_derivatives_are_those_of_the_definition() -> None:
    start, other = (torch.randn(5, 7, device=DEVICE, requires_grad=True) for _ in range(2))
    target = torch.randint(7, (5,), device=DEVICE)

    def second(backend: str) -> tuple[Tensor, ...]:
        cross_entropy, divergence = consistency(start * start, other, target, backend=backend)
        first = torch.autograd.grad(cross_entropy + 0.5 * divergence, (start, other), create_graph=True)
        return *first, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), (start, other))

    for found, wanted in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def output(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    def halves(*shape: int) -> tuple[Tensor, Tensor]:
        both = torch.randn(6, *shape, device=DEVICE).to(dtype).requires_grad_()
        leaves.append(both)
        return both[:3], both[3:]

    leaves: list[Tensor] = []
    logits = halves(5)
    features = [halves(1 + i, 4) for i in range(4)]
    return SimpleNamespace(
        logits1=logits[0], logits2=logits[1], features1=[f[0] for f in features], features2=[f[1] for f in features],
        leaves=leaves,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "detach_targets": True, "align": "all"}, {"alpha": 0.0}]
)
def test_the_whole_loss_is_that_of_pytorch(options: dict[str, object]) -> None:
    out, target = output(), torch.tensor([0, 4, 2], device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        parts = MoSALoss(backend=name, **options).parts(out, target)  # type: ignore[arg-type]
        results.append((*parts, *torch.autograd.grad(parts.total, out.leaves, allow_unused=True, retain_graph=True)))
    for found, wanted in zip(*results, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_whole_loss_compiles_to_one_graph() -> None:
    target = torch.tensor([0, 4, 2], device=DEVICE)
    criterion = MoSALoss(backend="triton")
    out = output()
    arguments = (out.logits1, out.logits2, out.features1, out.features2)

    def call(logits1: Tensor, logits2: Tensor, features1: list[Tensor], features2: list[Tensor]) -> Tensor:
        return criterion(Output(logits1, logits2, features1, features2), target)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*arguments), out.leaves, allow_unused=True, retain_graph=True)
    for found, wanted in zip(
        torch.autograd.grad(compiled(*arguments), out.leaves, allow_unused=True), expected, strict=True
    ):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted)


def test_the_operator_is_registered_rightly() -> None:
    logits = [torch.randn(3, 4, device=DEVICE, requires_grad=True) for _ in range(2)]
    target = torch.tensor([0, 1, 2], device=DEVICE)
    opcheck(torch.ops.mosa_kernels.consistency.default, (*logits, target, 0.1, False, "triton"))
    plain = [t.detach() for t in logits]
    *_, saved = torch.ops.mosa_kernels.consistency(*plain, target, 0.1, False, "triton")
    for grads, needs in (
        ((torch.tensor(1.0), torch.tensor(2.0)), [True, True]),
        ((None, torch.tensor(2.0)), [False, True]),
    ):
        grads = tuple(None if grad is None else grad.to(DEVICE) for grad in grads)
        arguments = (*grads, saved, needs, *plain, target, 0.1, False, "triton")
        opcheck(torch.ops.mosa_kernels.consistency_backward.default, arguments)


class Subclass(Tensor):
    pass


def test_what_is_declined_says_why() -> None:
    a, target = torch.zeros(2, 3, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    soft = torch.ones(2, 3, device=DEVICE)
    for logits1, logits2, to, reason in (
        (a.double(), a.double(), target, "logits1 is torch.float64; the kernels take float32, float16, bfloat16"),
        (a, a.double(), target, "logits2 is torch.float64"),
        (a, a.as_subclass(Subclass), target, "logits2 is a Subclass; the kernels take plain tensors"),
        (a[:0], a[:0], target[:0], "logits1 is empty"),
        (a, a, soft.requires_grad_(), "target requires a gradient"),
        (a, a, soft.detach().double(), "target is torch.float64"),
    ):
        with pytest.raises(ValueError, match=f"'triton' does not take this call: {reason}"):
            consistency(logits1, logits2, to, backend="triton")


@pytest.mark.parametrize("repeats", [pytest.param(3 if INTERPRETED else 200, id="repeats")])
def test_repeats_bitwise(repeats: int) -> None:
    both = torch.randn(8 if INTERPRETED else 256, 100, device=DEVICE, requires_grad=True)
    size = len(both) // 2
    target = torch.randint(100, (size,), device=DEVICE)

    def run() -> list[Tensor]:
        losses = consistency(both[:size], both[size:], target, backend="triton")
        return [*losses, *torch.autograd.grad(losses[0] + losses[1], both)]

    first = run()
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no graphs")
def test_a_replayed_graph_reads_the_logits_anew() -> None:
    both = torch.randn(64, 100, device="cuda", requires_grad=True)
    target = torch.randint(100, (32,), device="cuda")

    def run() -> list[Tensor]:
        losses = consistency(both[:32], both[32:], target, backend="triton")
        return [*losses, *torch.autograd.grad(losses[0] + losses[1], both)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            both.normal_()
        target.random_(100)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
