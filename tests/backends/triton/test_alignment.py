"""The alignment kernels against sums and slopes in float64, on a GPU or interpreted on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from torch import Tensor
from torch.library import opcheck

from mosa_kernels.functional.alignment import feature_alignment

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import alignment as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1 (as test_interpreted_operators.py sets it)",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no graphs and runs programs one by one")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
"""Relative; the interpreter cuts bf16 off where a GPU rounds to nearest."""
TINY = 2.0**-24  # the smallest subnormal of float16


def check(features1: list[Tensor], features2: list[Tensor], weight: float = 3.0) -> None:
    """Value and gradients against d mean((a - b)^2) / da = 2 (a - b) / numel in float64."""
    leaves = [feature.detach().requires_grad_() for feature in (*features1, *features2)]  # strides stay as they are
    count = len(features1)
    with poisoned_memory():
        loss = feature_alignment(leaves[:count], leaves[count:], backend="triton")
        (weight * loss).backward()
    assert loss.dtype == torch.float32
    gaps = [one.double() - two.double() for one, two in zip(features1, features2, strict=True)]
    expected = sum(gap.square().mean() for gap in gaps)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for layer, gap in enumerate(gaps):
        slope = weight * 2 * gap / gap.numel()
        for sign, leaf in ((1, leaves[layer]), (-1, leaves[count + layer])):
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            error = (leaf.grad.double() - sign * slope).abs()
            assert (error <= slope.abs() * (ROUNDING[leaf.dtype] + 2.0**-21) + TINY).all()


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6),
    halves=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shapes_and_dtypes(shapes, dtypes, halves, seed) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    if halves:
        both = [
            draw((2 * n, *rest), dtype) for (n, *rest), dtype in zip([s or (1,) for s in shapes], dtypes, strict=False)
        ]
        check([b[: len(b) // 2] for b in both], [b[len(b) // 2 :] for b in both])
    else:
        pairs = [(draw(shape, dtype), draw(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=False)]
        check([one for one, _ in pairs], [two for _, two in pairs])


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_programs_a_layer(dtype: torch.dtype) -> None:
    forward, backward = kernels.BLOCK * kernels.FORWARD_BLOCKS, kernels.BLOCK
    sizes = (forward + 1, 3, 2 * forward, backward - 16, 64)
    check(*([torch.randn(size, device=DEVICE).to(dtype) for size in sizes] for _ in range(2)))


def test_rows_apart_from_each_other() -> None:
    """Read where they lie, whatever the other feature looks like; only what is shuffled is copied."""
    wide = torch.randn(6, 5, 24, device=DEVICE)
    plain = torch.randn(6, 5, 8, device=DEVICE)
    sliced, expanded = wide[..., 8:16], plain[:1].expand(6, 5, 8)
    transposed = torch.randn(5, 6, 8, device=DEVICE).transpose(0, 1)
    assert kernels._rows_of(plain, sliced) == (8, 8, 24)
    assert kernels._rows_of(sliced, expanded) is None
    assert kernels._rows_of(plain, expanded) == (40, 40, 0)
    assert kernels._rows_of(transposed, plain) is None
    assert kernels._rows_of(wide[:3], wide[3:]) == (360, 360, 360)
    check([plain, sliced, sliced, expanded, transposed, wide[:3]], [sliced, plain, expanded, plain, plain, wide[3:]])


def test_addresses_that_are_not_aligned() -> None:
    base = torch.randn(2, 257, device=DEVICE)
    check([base[0, 1:].view(16, 16)], [base[1, 1:].view(16, 16)])


def test_half_precision_does_not_overflow() -> None:
    one = torch.full((2, 3), 30000.0, device=DEVICE).half()
    assert feature_alignment([one], [-one], backend="triton").item() == pytest.approx(60000.0**2, rel=1e-6)


def test_only_the_gradients_asked_for() -> None:
    features = [torch.randn(3, 7, device=DEVICE) for _ in range(4)]
    features[1].requires_grad_()
    features[2].requires_grad_()
    feature_alignment(features[:2], features[2:], backend="triton").backward()
    assert [feature.grad is not None for feature in features] == [False, True, True, False]
    torch.testing.assert_close(features[1].grad, 2 * (features[1] - features[3]).detach() / 21)
    torch.testing.assert_close(features[2].grad, -2 * (features[0] - features[2]).detach() / 21)
    with torch.no_grad():
        assert not feature_alignment(features[:2], features[2:], backend="triton").requires_grad


def test_second_derivatives_are_those_of_the_definition() -> None:
    start, other = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(2))

    def second(backend: str) -> tuple[Tensor, ...]:
        loss = feature_alignment([start * start, start], [other, other], backend=backend)
        first = torch.autograd.grad(loss, (start, other), create_graph=True)
        return *first, *torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), (start, other))

    for found, wanted in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_operator_is_registered_rightly() -> None:
    def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]

    shapes = ((2, 3, 4), (5,))
    opcheck(torch.ops.mosa_kernels.feature_alignment.default, (draw(*shapes), draw(*shapes), "triton"))
    plain = [[t.detach() for t in draw(*shapes)] for _ in range(2)]
    arguments = (torch.tensor(2.0, device=DEVICE), *plain, [True, False, True, True], "triton")
    opcheck(torch.ops.mosa_kernels.feature_alignment_backward.default, arguments)


def test_compiles_to_one_graph() -> None:
    both = [torch.randn(4, 5, 6, device=DEVICE, requires_grad=True) for _ in range(2)]

    def halves(one: Tensor, two: Tensor) -> Tensor:
        pairs = ([b[:2] for b in (one, two)], [b[2:] for b in (one, two)])
        return feature_alignment(*pairs, backend="triton")

    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        torch.autograd.grad(compiled(*both), both), torch.autograd.grad(halves(*both), both), strict=True
    ):
        assert torch.equal(found, wanted)
    assert torch.equal(compiled(*both), halves(*both))


class Subclass(Tensor):
    pass


def test_what_is_declined_says_why() -> None:
    a = torch.zeros(2, 3, device=DEVICE)
    other = a.as_subclass(Subclass)
    for one, two, reason in (
        (a, other, r"features1\[0\] or features2\[0\] is a subclass of Tensor"),
        (a.double(), a.double(), r"features1\[0\] is torch.float64; the kernels take float32, float16, bfloat16"),
        (a, a.half(), r"features2\[0\] is torch.float16, features1\[0\] torch.float32"),
        (a[:0], a[:0], r"features1\[0\] is empty"),
    ):
        with pytest.raises(ValueError, match=f"'triton' does not take this call: {reason}"):
            feature_alignment([one], [two], backend="triton")


@pytest.mark.parametrize("repeats", [pytest.param(3 if INTERPRETED else 200, id="repeats")])
def test_repeats_bitwise(repeats: int) -> None:
    layers = 2 if INTERPRETED else 12
    both = [torch.randn(4, 50, 200, device=DEVICE, requires_grad=True) for _ in range(layers)]

    def run() -> list[Tensor]:
        loss = feature_alignment([b[:2] for b in both], [b[2:] for b in both], backend="triton")
        return [loss, *torch.autograd.grad(loss, both)]

    first = run()
    for _ in range(repeats):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@needs_gpu
def test_many_at_once_on_two_streams() -> None:
    """Programs count themselves in memory that launches which overlap must not share."""
    both = [torch.randn(64, 197, 192, device="cuda") for _ in range(6)]
    wanted = feature_alignment([b[:32] for b in both], [b[32:] for b in both], backend="triton")
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(feature_alignment([b[:32] for b in both], [b[32:] for b in both], backend="triton"))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted) for result in results)


@needs_gpu
def test_a_replayed_graph_reads_the_features_anew() -> None:
    both = [torch.randn(8, 50, 192, device="cuda", requires_grad=True) for _ in range(3)]

    def run() -> list[Tensor]:
        loss = feature_alignment([b[:4] for b in both], [b[4:] for b in both], backend="triton")
        return [loss, *torch.autograd.grad(loss, both)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        with torch.no_grad():
            for b in both:
                b.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
