"""The split: disjoint, complete, balanced, reproducible, for every granularity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mosa_kernels as mk
from mosa_kernels.functional.split import GRANULARITIES


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


def test_experts_are_the_quantiles_of_the_scores() -> None:
    """Eq. 3: expert i owns the scores between the i-th and (i+1)-th N-quantile."""
    shape, num_experts = (33, 7), 4
    scores = torch.rand(1, 33 * 7, generator=_generator(5), dtype=torch.float64).view(shape)
    owner = mk.split(shape, num_experts, generator=_generator(5))
    for low, high in zip(range(num_experts - 1), range(1, num_experts), strict=True):
        assert scores[owner == low].max() < scores[owner == high].min()


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
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.split(**{"shape": (8, 8), **arguments})
