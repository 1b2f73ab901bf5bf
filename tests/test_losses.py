"""Eq. 6, term by term, against the formula in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosa_kernels.losses import MoSALoss

B, C = 3, 5


def output(depth: int = 4, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> SimpleNamespace:
    """Two passes of a model whose blocks, as in Swin, have features of different shapes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_(requires_grad)

    shapes = [(B, 1 + i, 1 + i % 2) for i in range(depth)]
    return SimpleNamespace(
        logits1=draw(B, C),
        logits2=draw(B, C),
        features1=[draw(*shape) for shape in shapes],
        features2=[draw(*shape) for shape in shapes],
    )


def equation_6(
    out: SimpleNamespace, target: Tensor, alpha: float, beta: float, align: object, smoothing: float = 0.0
) -> Tensor:
    """The formula with blocks counted from 1, as the paper counts them."""
    p1 = out.logits1.double().exp() / out.logits1.double().exp().sum(1, keepdim=True)
    p2 = out.logits2.double().exp() / out.logits2.double().exp().sum(1, keepdim=True)
    y = target.double() if target.dim() == 2 else torch.eye(C, dtype=torch.float64)[target]
    y = (1 - smoothing) * y + smoothing / C
    loss = -(y * p1.log()).sum() / B
    loss = loss + alpha / 2 * ((p1 * (p1 / p2).log()).sum() + (p2 * (p2 / p1).log()).sum()) / B
    depth = len(out.features1)
    for i, (f1, f2) in enumerate(zip(out.features1, out.features2, strict=True), start=1):
        wanted = {"none": False, "shallow": i <= depth / 2, "deep": i > depth / 2, "all": True}
        if wanted[align] if isinstance(align, str) else i - 1 in align:
            loss = loss + beta * ((f1.double() - f2.double()) ** 2).sum() / f1.numel()
    return loss


@settings(max_examples=60)
@given(
    depth=st.integers(1, 7),
    alpha=st.sampled_from((0.0, 1.0, 0.3)),
    beta=st.sampled_from((0.0, 1.0, 2.5)),
    align=st.sampled_from(("none", "shallow", "deep", "all", (0,), ())),
    smoothing=st.sampled_from((0.0, 0.1)),
    soft=st.booleans(),
    detach=st.booleans(),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_is_equation_6(depth, alpha, beta, align, smoothing, soft, detach, dtype) -> None:
    out = output(depth, dtype)
    target = torch.rand(B, C, dtype=torch.float64).softmax(1) if soft else torch.randint(C, (B,))
    criterion = MoSALoss(alpha, beta, align, smoothing, detach_targets=detach)
    parts = criterion.parts(out, target)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    expected = equation_6(out, target, alpha, beta, align, smoothing)
    torch.testing.assert_close(parts.total.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(criterion(out, target), parts.total)
    assert parts.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    combined = parts.cross_entropy + alpha * parts.consistency + beta * parts.alignment
    torch.testing.assert_close(parts.total, combined)


def test_gradients_are_those_of_equation_6() -> None:
    out = output(5, requires_grad=True)
    leaves = [out.logits1, out.logits2, *out.features1, *out.features2]
    target = torch.randint(C, (B,))
    criterion = MoSALoss(0.7, 1.3, "shallow", 0.1)
    found = torch.autograd.grad(criterion(out, target), leaves, allow_unused=True)
    expected = torch.autograd.grad(equation_6(out, target, 0.7, 1.3, "shallow", 0.1), leaves, allow_unused=True)
    assert [grad is None for grad in found] == [grad is None for grad in expected]
    assert sum(grad is None for grad in found) == 6  # three of five blocks, twice
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("align", ["shallow", "all"])
def test_gradcheck(align: str) -> None:
    out = output(3, requires_grad=True)
    target = torch.rand(B, C, dtype=torch.float64).softmax(1)
    leaves = (out.logits1, out.logits2, *out.features1, *out.features2)

    def call(logits1: Tensor, logits2: Tensor, *features: Tensor) -> Tensor:
        again = SimpleNamespace(logits1=logits1, logits2=logits2, features1=features[:3], features2=features[3:])
        return MoSALoss(align=align)(again, target)

    assert torch.autograd.gradcheck(call, leaves)


def test_two_equal_passes_are_cross_entropy() -> None:
    out = output()
    out.logits2, out.features2 = out.logits1, out.features1
    target = torch.randint(C, (B,))
    parts = MoSALoss(align="all").parts(out, target)
    assert parts.consistency == 0
    assert parts.alignment == 0
    assert torch.equal(parts.total, parts.cross_entropy)


def test_one_pass_is_cross_entropy() -> None:
    out = output()
    target = torch.randint(C, (B,))
    single = SimpleNamespace(logits1=out.logits1, logits2=None, features1=None, features2=None)
    expected = -out.logits1.log_softmax(1)[torch.arange(B), target].mean()
    for given_output in (single, out.logits1):
        parts = MoSALoss().parts(given_output, target)
        torch.testing.assert_close(parts.total, expected)
        assert parts.consistency == parts.alignment == 0


@pytest.mark.parametrize(
    ("align", "depth", "expected"),
    [
        ("none", 12, ()),
        ("shallow", 12, (0, 1, 2, 3, 4, 5)),
        ("shallow", 5, (0, 1)),
        ("deep", 5, (2, 3, 4)),
        ("all", 3, (0, 1, 2)),
        ("shallow", 1, ()),
        ([4, 0], 5, (0, 4)),
    ],
)
def test_needs_features(align: object, depth: int, expected: tuple[int, ...]) -> None:
    assert MoSALoss(align=align).needs_features(depth) == expected  # type: ignore[arg-type]
    assert MoSALoss(align=align, beta=0.0).needs_features(depth) == ()  # type: ignore[arg-type]


def test_features_that_are_not_compared_may_be_missing() -> None:
    out, target = output(5), torch.randint(C, (B,))
    expected = MoSALoss()(out, target)
    for features in (out.features1, out.features2):
        features[2:] = [None] * 3
    assert torch.equal(MoSALoss()(out, target), expected)
    with pytest.raises(ValueError, match=r"features1\[2\]: expected a tensor for align='deep', got None"):
        MoSALoss(align="deep")(out, target)
    out.features1 = out.features2 = None
    for criterion in (MoSALoss(align="none"), MoSALoss(beta=0.0)):
        assert criterion(out, target).isfinite()
    with pytest.raises(
        ValueError, match="features1: expected the features of each block for align='shallow', got None"
    ):
        MoSALoss()(out, target)


def test_half_precision_logits_far_apart() -> None:
    out, target = output(dtype=torch.float16), torch.randint(C, (B,))
    out.logits1, out.logits2 = out.logits1 * 10000, out.logits2 * 10000
    for t in (out.logits1, out.logits2):
        t.requires_grad_()
    loss = MoSALoss()(out, target)
    loss.backward()
    assert loss.isfinite()
    assert out.logits1.grad.isfinite().all()
    assert out.logits2.grad.isfinite().all()


def test_autocast_and_compile_do_not_change_the_value() -> None:
    out, target = output(dtype=torch.bfloat16), torch.randint(C, (B,))
    expected = MoSALoss()(out, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(MoSALoss()(out, target), expected)
    compiled = torch.compile(MoSALoss(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out, target), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha: expected a finite number of at least 0, got -1"),
        ({"beta": float("nan")}, "beta: expected a finite number of at least 0, got nan"),
        ({"align": "middle"}, "align: expected one of none, shallow, deep, all or block indices, got 'middle'"),
        ({"align": [1, 1]}, r"align: expected different block indices of at least 0, got \[1, 1\]"),
        ({"align": [-1]}, r"align: expected different block indices of at least 0, got \[-1\]"),
        ({"align": 3}, "align: expected one of none, .* or block indices, got 3"),
        ({"alpha": "1"}, "alpha: expected a finite number of at least 0, got '1'"),
        ({"detach_targets": None}, "detach_targets: expected True or False, got None"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected 0 to 1, got 1.5"),
        ({"backend": "cpu"}, "backend: expected one of reference, triton or None, got 'cpu'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoSALoss(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "target", "error", "message"),
    [
        ({}, torch.zeros(B, dtype=torch.bool), TypeError, "target: expected classes .* got torch.bool"),
        ({}, torch.zeros(B + 1, dtype=torch.int64), ValueError, r"target: expected shape \[3\] .* got \[4\]"),
        ({}, torch.zeros(B, dtype=torch.float32), ValueError, r"target: expected shape \[3, 5\] .* got \[3\]"),
        ({}, [0, 1, 2], TypeError, "target: expected a tensor, got list"),
        ({}, torch.tensor([0, 9, -100]), ValueError, "target: expected classes from 0 to 4, or -100 for none, got 9"),
        ({}, torch.tensor([0, -1, 2]), ValueError, "target: expected classes from 0 to 4, or -100 for none, got -1"),
        ({}, torch.tensor([0, 1, 156], dtype=torch.uint8), ValueError, "target: expected classes .* got 156"),
        ({"logits2": None}, torch.tensor([0, 1, 5]), ValueError, "target: expected classes from 0 to 4.* got 5"),
        (
            {"logits1": torch.zeros(B, C).long()},
            None,
            TypeError,
            "logits1: expected a floating-point .* got torch.int64",
        ),
        ({"logits1": torch.zeros(B)}, None, ValueError, r"logits1: expected shape \[B, C\], got \[3\]"),
        ({"logits2": torch.zeros(B, C + 1)}, None, ValueError, r"logits2: expected .* got \[3, 6\] and \[3, 5\]"),
        ({"features2": [torch.zeros(1)]}, None, ValueError, "features2: expected 4 blocks, as features1, got 1"),
    ],
)
def test_bad_input_is_named(
    changes: dict[str, object], target: Tensor | None, error: type[Exception], message: str
) -> None:
    out = output()
    for name, value in changes.items():
        setattr(out, name, value)
    with pytest.raises(error, match=message):
        MoSALoss()(out, torch.zeros(B, dtype=torch.int64) if target is None else target)


def test_a_block_beyond_the_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"align: expected block indices below the depth, 4, got \[0, 4\]"):
        MoSALoss(align=[0, 4])(output(4), torch.zeros(B, dtype=torch.int64))
