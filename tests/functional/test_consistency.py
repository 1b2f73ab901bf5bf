"""Cross-entropy and divergence against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosa_kernels.functional.consistency import consistency, symmetric_kl


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


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.sampled_from((torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16)),
    st.sampled_from((0.0, 0.1, 1.0)),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_consistency(batch: int, classes: int, target_dtype: torch.dtype, smoothing: float, dtype: torch.dtype) -> None:
    first, second = (torch.randn(batch, classes).to(dtype) for _ in range(2))
    if target_dtype.is_floating_point:
        target = torch.rand(batch, classes).to(target_dtype)
        wanted = target.double()
    else:
        target = torch.randint(classes, (batch,)).to(target_dtype)
        wanted = torch.eye(classes, dtype=torch.float64)[target.long()]
    wanted = (1 - smoothing) * wanted + smoothing / classes
    log_p = first.double() - first.double().exp().sum(1, keepdim=True).log()
    cross_entropy, divergence = consistency(first, second, target, label_smoothing=smoothing)
    tolerance = {torch.float64: 1e-6 if target_dtype.is_floating_point else 1e-10}.get(dtype, 2e-5)
    assert cross_entropy.item() == pytest.approx(-(wanted * log_p).sum().item() / batch, rel=tolerance, abs=tolerance)
    assert torch.equal(divergence, symmetric_kl(first, second))


def test_gradcheck() -> None:
    logits = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(symmetric_kl, logits)
    soft = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, y: consistency(a, b, y, label_smoothing=0.1), (*logits, soft))


def test_large_sixteen_bit_values_do_not_overflow() -> None:
    logits = torch.tensor([[60000.0, -60000.0, 0.0]]).half()
    assert symmetric_kl(logits, logits).item() == 0
    assert symmetric_kl(logits, -logits).isfinite()


def test_labels_of_minus_100_do_not_count() -> None:
    first, second = torch.randn(2, 4, 3)
    found, divergence = consistency(first, second, torch.tensor([0, -100, 2, -100]))
    log_p = first.log_softmax(1)
    torch.testing.assert_close(found, -(log_p[0, 0] + log_p[2, 2]) / 2)
    torch.testing.assert_close(divergence, symmetric_kl(first, second))


def test_errors_name_the_argument() -> None:
    a, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for call in (lambda b: symmetric_kl(a, b), lambda b: consistency(a, b, target)):
        with pytest.raises(
            ValueError, match=r"logits2: expected the shape \[B, C\] of logits1, got \[2, 4\] and \[2, 3\]"
        ):
            call(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="backend: expected one of reference, triton or None, got 'cpu'"):
        consistency(a, a, target, backend="cpu")
    for smoothing in (-0.1, 1.5, "much"):
        with pytest.raises(ValueError, match=f"label_smoothing: expected 0 to 1, got {smoothing!r}"):
            consistency(a, a, target, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", [(), (2,), (6,), (1, 4), (4, 3), (2, 5)], ids=str)
def test_a_target_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    logits, many = torch.randn(4, 5), len(shape) > 1
    target = torch.rand(shape) if many else torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"target: expected shape " + (r"\[4, 5\]" if many else r"\[4\]")):
        consistency(logits, logits, target)
