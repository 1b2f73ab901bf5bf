"""The split: disjoint, complete, balanced, reproducible, random, and the same on every device."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mosa_kernels as mk
from mosa_kernels.backends import split as reference
from mosa_kernels.backends.cpu import split as cpu
from mosa_kernels.backends.cuda import split as cuda
from mosa_kernels.backends.split import SplitLayout
from mosa_kernels.functional.split import GRANULARITIES, _layout


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.sampled_from(GRANULARITIES), st.integers(0, 2**40))
def test_balanced_partition(rows: int, columns: int, num_experts: int, granularity: str, seed: int) -> None:
    block = 8
    units = {
        "element": rows * columns,
        "row": rows,
        "column": columns,
        "block": -(-rows // block) * -(-columns // block),
        "even_rows": columns,
        "even_columns": rows,
    }[granularity]
    if num_experts > units:
        with pytest.raises(ValueError, match=f"num_experts: expected at most {units}.*got {num_experts}"):
            mk.split((rows, columns), num_experts, granularity, _generator(seed), block_size=block)
        return
    owner = mk.split((rows, columns), num_experts, granularity, _generator(seed), block_size=block)
    assert owner.dtype == torch.uint8
    assert owner.shape == (rows, columns)
    assert owner.is_contiguous()
    assert torch.equal(owner, mk.split((rows, columns), num_experts, granularity, _generator(seed), block_size=block))

    shares = {
        "element": owner.reshape(1, -1),
        "row": owner[:, 0].reshape(1, -1),
        "column": owner[0].reshape(1, -1),
        "block": owner[::block, ::block].reshape(1, -1),
        "even_rows": owner,
        "even_columns": owner.t(),
    }[granularity]
    for line in shares:
        counts = line.long().bincount(minlength=num_experts)
        assert counts.numel() == num_experts
        assert counts.max() - counts.min() <= 1
    if granularity == "row":
        assert (owner == owner[:, :1]).all()
    if granularity == "column":
        assert (owner == owner[:1]).all()
    if granularity == "block":
        grown = owner[::block, ::block].repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        assert torch.equal(owner, grown)


def split_on_host(layout: SplitLayout, seed: Tensor, device: torch.device) -> Tensor:
    """The CUDA kernel with the very arguments that a GPU would get; half of the seeds by address."""
    owners = torch.empty(layout.rows, layout.columns, dtype=torch.uint8)
    address, value = (seed.data_ptr(), 0) if int(seed) % 2 else (0, int(seed))
    cuda_on_host.build("split").split_cuda(owners.data_ptr(), address, value, layout, 0, 0)
    return owners


CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cuda_on_host.find_compiler() is None, reason="no C++ compiler")
needs_cpu = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
IMPLEMENTATIONS = [
    pytest.param(reference.split, id="reference"),
    pytest.param(cpu.split, id="cpu", marks=needs_cpu),
    pytest.param(split_on_host, id="cuda_on_host", marks=needs_compiler),
]
SEEDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from((0, -1, 2**31, 2**32, 2**63 - 1, -(2**63))))


def definition(layout: SplitLayout, seed: int) -> Tensor:
    """The split in integers of any size: one entry after the other, as the documentation says it."""

    def hashed(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
        h = (h ^ (h >> 15)) * 0x735A2D97 % 2**32
        return h ^ (h >> 15)

    def draw(key: tuple[int, int], counter: int) -> int:
        return hashed(hashed((counter + key[0]) % 2**32) ^ key[1])

    owners = torch.empty(layout.rows, layout.columns, dtype=torch.uint8)
    whole = (seed % 2**32, seed % 2**64 >> 32)
    for i in range(layout.rows):
        for j in range(layout.columns):
            line = i * layout.line_per_row + j * layout.line_per_column
            place = i // layout.side * layout.unit_per_row + j // layout.side * layout.unit_per_column
            key = (draw(whole, 2 * line), draw(whole, 2 * line + 1))
            for number in range(24):
                partner = (draw(key, number) * layout.units // 2**32 - place) % layout.units
                if draw(key, 24 + number * layout.units + max(place, partner)) >= 2**31:
                    place = partner
            owners[i, j] = place * layout.num_experts // layout.units
    return owners


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.sampled_from(GRANULARITIES), SEEDS)
def test_equals_the_definition(implementation, rows, columns, num_experts, granularity, seed) -> None:
    layout = _layout(rows, columns, num_experts, granularity, 3)
    assert torch.equal(implementation(layout, torch.tensor(seed), CPU), definition(layout, seed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_large_splits_are_the_same_everywhere(implementation, granularity: str) -> None:
    layout = _layout(517, 129, 7, granularity, 16)
    seed = torch.tensor(-12345)
    assert torch.equal(implementation(layout, seed, CPU), reference.split(layout, seed, CPU))


def test_one_state_of_the_generator_gives_one_split() -> None:
    """The default generator is the CPU's, as an explicit one; a second call goes on from there."""
    generator = _generator(3)
    first, second = (mk.split((40, 8), 4, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, mk.split((40, 8), 4))
    assert torch.equal(second, mk.split((40, 8), 4))


def test_traced_and_fake_splits_take_the_definition() -> None:
    assert mk.split((6, 5), 3, device="meta").is_meta
    with FakeTensorMode():
        assert mk.split((6, 5), 3).shape == (6, 5)


# How random it is. The seeds are fixed, so these pass or fail for good; scores are in standard deviations.


def places(seeds: Tensor, units: int) -> Tensor:
    """Where each seed's permutation takes each unit: [seeds, units]."""
    return reference._shuffled_places(seeds.unsqueeze(1), 1, units).long()


def chi_square(counts: Tensor, expected: Tensor | float, freedom: int) -> float:
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("step", [1, 2**32, 2**40 + 1])
@pytest.mark.parametrize(("units", "num_experts"), [(7, 3), (24, 4), (64, 4)])
def test_every_place_is_as_likely_whatever_differs_between_seeds(units: int, num_experts: int, step: int) -> None:
    count = 4000
    owner = places(step * torch.arange(count), units) * num_experts // units
    counts = torch.stack([(owner == e).sum(0) for e in range(num_experts)]).double()  # [N, units]
    share = (torch.arange(units) * num_experts // units).bincount().double() / units
    expected = count * share.unsqueeze(1)
    shrunk = expected + (counts - expected) * (1 - 1 / units) ** 0.5  # a split holds every expert just so often
    assert abs(chi_square(shrunk, expected, (units - 1) * (num_experts - 1))) < 4


@pytest.mark.parametrize("units", [2, 3, 4, 5])
def test_every_permutation_is_as_likely(units: int) -> None:
    count, all_of_them = 40_000, math.factorial(units)
    codes = (places(torch.arange(count), units) * units ** torch.arange(units)).sum(1)
    found, counts = codes.unique(return_counts=True)
    assert len(found) == all_of_them
    assert abs(chi_square(counts, count / all_of_them, all_of_them - 1)) < 4


def test_pairs_of_entries_are_independent() -> None:
    units, count = 10, 30_000
    place = places(torch.arange(count), units)
    scores = []
    for first in range(units):
        for second in range(first):
            counts = (place[:, first] * units + place[:, second]).bincount(minlength=units**2).view(units, units)
            assert counts.diagonal().sum() == 0
            others = counts[~torch.eye(units, dtype=torch.bool)]
            scores.append(chi_square(others, count / len(others), len(others) - 1))
    assert max(map(abs, scores)) < 4.5
    assert abs(sum(scores) / len(scores)) < 0.6


@pytest.mark.parametrize("seed", range(3))
def test_no_structure_in_rows_columns_distances_and_mirrors(seed: int) -> None:
    """A mirror is what the shuffle is made of: entries i and K - i must not know of each other either, for any K."""
    owner = reference.split(_layout(768, 64, 4, "element", 1), torch.tensor(seed), CPU)
    for lines in (owner, owner.t()):
        counts = torch.stack([(lines == e).sum(1) for e in range(4)])
        assert abs(chi_square(counts, lines.shape[1] / 4, 3 * (lines.shape[0] - 1))) < 4
    entries = owner.numel()
    spectrum = torch.fft.rfft((owner.view(-1).double() - 1.5) / 1.25**0.5)
    distances = torch.fft.irfft(spectrum.conj() * spectrum, entries)[1:] / entries**0.5
    mirrors = torch.fft.irfft(spectrum * spectrum, entries) / (2 * entries) ** 0.5  # every pair counts twice
    for score in (distances, mirrors):
        assert score.abs().max() < 5.2  # the largest of 49152 normal numbers exceeds it once in a hundred times
        assert 0.98 < score.std() < 1.02


def test_neighbouring_seeds_and_lines_are_independent() -> None:
    one, other = (reference.split(_layout(768, 64, 4, "element", 1), torch.tensor(s), CPU).long() for s in (7, 8))
    lines = reference.split(_layout(769, 64, 4, "even_rows", 1), torch.tensor(7), CPU).long()
    for first, second in ((one, other), (lines[1:], lines[:-1]), (one, lines[1:])):
        counts = (4 * first + second).view(-1).bincount(minlength=16)
        assert abs(chi_square(counts, first.numel() / 16, 9)) < 4


def test_seeds_differ() -> None:
    assert not torch.equal(mk.split((64, 8), 4, generator=_generator(0)), mk.split((64, 8), 4, generator=_generator(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (0, 4)}, "shape: expected two positive sizes"),
        ({"shape": (3,)}, "shape: expected two positive sizes"),
        ({"num_experts": 0}, "num_experts: expected 1 to 255, got 0"),
        ({"num_experts": 256}, "num_experts: expected 1 to 255, got 256"),
        ({"granularity": "rows"}, "granularity: expected one of element, .*got 'rows'"),
        ({"granularity": "block", "block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"shape": 8}, "shape: expected two whole numbers, got 8"),
        ({"shape": (8, 4.0)}, r"shape: expected two whole numbers, got \(8, 4.0\)"),
        ({"num_experts": "4"}, "num_experts: expected a whole number, got '4'"),
        ({"granularity": "block", "block_size": 1.5}, "block_size: expected a whole number, got 1.5"),
        ({"generator": 0}, "generator: expected a torch.Generator or None, got 0"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mk.split(**{"shape": (8, 8), **arguments})


@needs_compiler
def test_launch_errors_name_launch_shape_and_cause() -> None:
    module, owners = cuda_on_host.build("split"), torch.empty(6, 5, dtype=torch.uint8)
    layout = _layout(6, 5, 3, "element", 1)
    for wrong, cause in (
        (layout._replace(units=29), "a unit beyond those of its line"),
        (layout._replace(num_experts=256), "an expert that does not exist"),
        (layout._replace(line_per_row=1, line_per_column=1), "neither rows nor columns"),
    ):
        with pytest.raises(RuntimeError, match=rf"split_cuda of \[6, 5\] into .* failed: .*{cause}"):
            module.split_cuda(owners.data_ptr(), 0, 0, wrong, 0, 0)


@needs_compiler
@pytest.mark.slow
def test_a_broken_kernel_is_found() -> None:
    """A test of these tests: one round less."""
    layout, owners = _layout(20, 3, 4, "element", 1), torch.empty(20, 3, dtype=torch.uint8)
    broken = cuda_on_host.build("split", {"split.cu": ("round < kSplitRounds", "round + 1 < kSplitRounds")})
    broken.split_cuda(owners.data_ptr(), 0, 5, layout, 0, 0)
    assert not torch.equal(owners, definition(layout, 5))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gpu_draws_what_the_cpu_draws(granularity: str) -> None:
    arguments = ((768, 64), 4, granularity)
    want = mk.split(*arguments, generator=_generator(11))
    assert torch.equal(mk.split(*arguments, generator=_generator(11), device="cuda").cpu(), want)
    layout, seed = _layout(*arguments[0], 4, granularity, 16), torch.tensor(-77)
    device = torch.device("cuda")
    want = reference.split(layout, seed, CPU)
    for implementation in (cuda.split, reference.split):
        for there in (seed, seed.cuda()):
            assert torch.equal(implementation(layout, there, device).cpu(), want)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_draws_anew_from_the_seed_on_the_device() -> None:
    layout, seed, device = _layout(100, 40, 4, "element", 1), torch.tensor(1, device="cuda"), torch.device("cuda")
    cuda.split(layout, seed, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        owners = cuda.split(layout, seed, device)
    for number in (5, -6):
        seed.fill_(number)
        graph.replay()
        assert torch.equal(owners.cpu(), reference.split(layout, torch.tensor(number), CPU))
