"""Alignment and consistency against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosa_kernels.functional.alignment import feature_alignment
from mosa_kernels.functional.consistency import symmetric_kl


def kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL(p || q), batch mean, from the definition, class by class."""
    total = 0.0
    for row_p, row_q in zip(p_logits.double().tolist(), q_logits.double().tolist(), strict=True):
        log_p = [value - math.log(sum(math.exp(v - max(row_p)) for v in row_p)) - max(row_p) for value in row_p]
        log_q = [value - math.log(sum(math.exp(v - max(row_q)) for v in row_q)) - max(row_q) for value in row_q]
        total += sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
    return total / len(p_logits)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)
def test_feature_alignment(shapes: list[list[int]], dtype: torch.dtype) -> None:
    first = [torch.randn(shape).to(dtype) for shape in shapes]
    second = [torch.randn(shape).to(dtype) for shape in shapes]
    expected = 0.0
    for a, b in zip(first, second, strict=True):
        squares = [
            (x - y) ** 2 for x, y in zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True)
        ]
        expected += sum(squares) / len(squares)
    found = feature_alignment(first, second)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from((0.1, 1.0, 30.0)),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
    st.booleans(),
)
def test_symmetric_kl(batch: int, classes: int, spread: float, dtype: torch.dtype, detach: bool) -> None:
    first, second = ((spread * torch.randn(batch, classes)).to(dtype) for _ in range(2))
    found = symmetric_kl(first, second, detach)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert found.item() == pytest.approx(kl(first, second) + kl(second, first), rel=tolerance, abs=tolerance)


def test_detached_targets_drop_the_gradient_through_them() -> None:
    first, second = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    symmetric_kl(first, second, detach_targets=True).backward()
    # d KL(t || q) / d q_logits = softmax(q) - t for a constant t.
    difference = (first.softmax(1) - second.softmax(1)).detach() / 3
    torch.testing.assert_close(first.grad, difference)
    torch.testing.assert_close(second.grad, -difference)


def test_gradcheck() -> None:
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(symmetric_kl, logits)
    features = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: feature_alignment([a, b], [c, d]), features)


def test_large_sixteen_bit_values_do_not_overflow() -> None:
    first, second = torch.full((2, 3), 30000.0).half(), torch.full((2, 3), -30000.0).half()
    assert feature_alignment([first], [second]).item() == pytest.approx(60000.0**2, rel=1e-6)
    logits = torch.tensor([[60000.0, -60000.0, 0.0]]).half()
    assert symmetric_kl(logits, logits).item() == 0
    assert symmetric_kl(logits, -logits).isfinite()


def test_errors_name_the_argument() -> None:
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="features2: expected as many layers as features1, at least one, got 1 and 2"):
        feature_alignment([a, a], [a])
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        feature_alignment([], [])
    with pytest.raises(
        ValueError, match=r"features2\[1\]: expected the shape of features1\[1\], \[2, 3\], got \[2, 4\]"
    ):
        feature_alignment([a, a], [a, torch.zeros(2, 4)])
    with pytest.raises(ValueError, match=r"logits2: expected the shape \[B, C\] of logits1, got \[2, 4\] and \[2, 3\]"):
        symmetric_kl(a, torch.zeros(2, 4))
