"""The per-image random numbers: independent of the batch, uniform, and permutations that are permutations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mosa_kernels.data.draws import Draws


@given(
    seed=st.integers(-(2**40), 2**70),
    indices=st.lists(st.integers(0, 2**50), min_size=1, max_size=20),
    shape=st.sampled_from([(), (3,), (2, 5)]),
)
def test_an_image_draws_the_same_numbers_in_any_batch(seed: int, indices: list[int], shape: tuple[int, ...]) -> None:
    together = Draws(seed, "s", np.array(indices))
    first, second = together.uniform(-1, 2, shape), together.integers(7, shape)
    assert first.shape == (len(indices), *shape)
    for row, index in enumerate(indices):
        alone = Draws(seed, "s", np.array([index]))
        np.testing.assert_array_equal(alone.uniform(-1, 2, shape)[0], first[row])
        np.testing.assert_array_equal(alone.integers(7, shape)[0], second[row])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    values = Draws(3, "s", np.arange(2000)).uniform(0, 1, (50,)).astype(np.float64)
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    share = np.histogram(values, bins=20, range=(0, 1))[0] / values.size
    assert np.abs(share - 0.05).max() < 5 * np.sqrt(0.05 * 0.95 / values.size)
    for other in (values[:, 1:] * values[:, :-1], values[1:] * values[:-1]):  # neighbours in an image, and images
        assert abs(other.mean() - 0.25) < 5 * 0.22 / np.sqrt(other.size)


def test_seeds_and_streams_are_independent() -> None:
    base = Draws(0, "a", np.arange(50)).uniform()
    for other in (Draws(1, "a", np.arange(50)), Draws(0, "b", np.arange(50)), Draws(0, "a", np.arange(50, 100))):
        assert len(np.intersect1d(base, other.uniform())) <= 1


def test_integers_reach_every_value_equally() -> None:
    values = Draws(0, "s", np.arange(3000)).integers(9, (4,))
    counts = np.bincount(values.ravel(), minlength=9)
    assert len(counts) == 9
    assert np.abs(counts / values.size - 1 / 9).max() < 5 * np.sqrt(1 / 9 / values.size)


def test_permutations_hold_every_number_and_differ() -> None:
    orders = Draws(0, "s", np.arange(300)).permutation(9)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(9), (300, 1)))
    assert len(np.unique(orders, axis=0)) > 290
    assert np.bincount(orders[:, 0], minlength=9).min() > 15
