"""Tests of paired differences, against values by hand and every way to choose the signs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from mosa_kernels.train.paired_tests import MOST_EXACT, paired_t, signed_rank


def by_enumeration(differences: list[float]) -> float:
    """Two-sided p from all 2^n signs, of differences that are exact numbers."""
    known = [value for value in differences if value]
    ranks = stats.rankdata(np.abs(known))
    observed = abs(float(np.dot(ranks, np.sign(known))))
    signs = itertools.product((-1, 1), repeat=len(known))
    return float(np.mean([abs(float(np.dot(ranks, each))) >= observed - 1e-9 for each in signs]))


def test_paired_tests_against_values_by_hand():
    # t = mean / (s / sqrt n) = 2 / (1 / sqrt 3); two degrees of freedom have F(t) = 1/2 + t / (2 sqrt(2 + t^2)).
    t = 2 * math.sqrt(3)
    assert paired_t([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired_t([0.0, 0.0]) == 1
    assert paired_t([1.0]) is None
    assert signed_rank([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(2 / 64)  # all signs alike: 2 of 2^6
    assert signed_rank([0.0] * 6) == 1
    assert signed_rank([1.0] * 5) is None


@pytest.mark.parametrize("count", [6, 9, 12])
@pytest.mark.parametrize("largest", [2, 5, 1000])
def test_the_signed_rank_test_is_exact_with_ties_and_zeros(count: int, largest: int):
    generator = np.random.default_rng(count * largest)
    for shift in (0, 1, largest):
        differences = (generator.integers(-largest, largest + 1, count) + shift).astype(float).tolist()
        if any(differences):
            assert signed_rank(differences) == pytest.approx(by_enumeration(differences), rel=1e-9)


def test_the_last_bits_of_percentages_decide_nothing():
    right, wrong = (
        np.array(counts) / 3000 * 100 for counts in ([1811, 1760, 1901, 1650, 1700, 1777, 1888, 1999], [1801] * 8)
    )
    shifted = [[100 * (a + d) / 3000 - 100 * a / 3000 for a in (7, 1234, 2001, 1499, 2718, 911)] for d in (1, -1)]
    assert len(set(shifted[0])) > 1  # one image of 3000 more, each
    equal = [*shifted[0], *shifted[1][:2]]
    assert signed_rank(equal) == pytest.approx(by_enumeration([1.0] * 6 + [-1.0] * 2))
    assert signed_rank((right - wrong).tolist()) == pytest.approx(
        by_enumeration([10, -41, 100, -151, -101, -24, 87, 198])
    )
    noise = (100 * (0.1 + 0.2) / 3 - 10.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert noise[0] != 0
    assert paired_t(noise) == signed_rank(noise) == 1


def test_many_differences_are_exact_within_reason():
    generator = np.random.default_rng(0)
    for count in (60, MOST_EXACT):
        differences = generator.normal(0.1, 1, count).tolist()
        exact = signed_rank(differences)
        assert exact == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, rel=1e-6)
    assert signed_rank([1.0] * MOST_EXACT) == pytest.approx(2.0 ** (1 - MOST_EXACT))
    approximate = signed_rank(generator.normal(0.1, 1, MOST_EXACT + 1).tolist())
    assert approximate is not None
    assert 0 < approximate < 1
