"""Alignment against sums written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosa_kernels.functional.alignment import feature_alignment


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


def test_gradcheck() -> None:
    features = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda a, b, c, d: feature_alignment([a, b], [c, d]), features)


def test_large_sixteen_bit_values_do_not_overflow() -> None:
    first, second = torch.full((2, 3), 30000.0).half(), torch.full((2, 3), -30000.0).half()
    assert feature_alignment([first], [second]).item() == pytest.approx(60000.0**2, rel=1e-6)


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
    with pytest.raises(ValueError, match="backend: expected one of reference, triton or None, got 'cpu'"):
        feature_alignment([a], [a], backend="cpu")
    for features, wrong in (((a, [a]), "features1"), (([a], a), "features2"), (([a], None), "features2")):
        with pytest.raises(TypeError, match=f"{wrong}: expected a list of tensors, one a layer, got"):
            feature_alignment(*features)
