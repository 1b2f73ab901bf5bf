"""Tests of paired differences: of accuracies in percent, run by run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEWEST_RANKS = 6  # of fewer pairs, the smallest p of a two-sided signed-rank test is above 5 %
# Subtracted percentages of equal counts differ in their last bits; a percent of a million images has fewer places.
PLACES = 6
MOST_EXACT = 500  # differences: 0.3 s; the normal approximation is 0.1 % off there (p = 0.419)


def paired_t(differences: Sequence[float]) -> float | None:
    """p of the two-sided t-test that the mean difference is zero; None of fewer than two, 1 where all are zero."""
    from scipy import stats  # type: ignore[import-untyped]

    if len(differences) < 2:
        return None
    if not rounded(differences).any():
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences that hardly differ: the p is small, as it should
        return float(stats.ttest_rel(differences, [0.0] * len(differences)).pvalue)


def signed_rank(differences: Sequence[float]) -> float | None:
    """p of Wilcoxon's two-sided signed-rank test; None of fewer than six, 1 where all are zero.

    Differences of zero are left away and equal ones share their mean rank; p is exact up to 500 differences.
    """
    from scipy import stats

    if len(differences) < FEWEST_RANKS:
        return None
    known = rounded(differences)
    known = known[known != 0]
    if not len(known):
        return 1.0
    if len(known) > MOST_EXACT:
        return float(stats.wilcoxon(known, method="asymptotic").pvalue)
    ranks = np.rint(2 * stats.rankdata(np.abs(known))).astype(np.int64)  # twice the ranks: whole numbers, ties or not
    rarer = min(int(ranks[known > 0].sum()), int(ranks[known < 0].sum()))
    return min(1.0, 2 * float(sum_of_ranks(ranks)[: rarer + 1].sum()))


def rounded(differences: Sequence[float]) -> NDArray[np.float64]:
    """Without what rounding left of subtractions, so that equal differences are equal."""
    return np.asarray(differences, dtype=np.float64).round(PLACES)


def sum_of_ranks(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """The probability of each sum from 0 to that of all, where each rank counts or not with probability 1/2."""
    chance = np.zeros(int(ranks.sum()) + 1)
    chance[0] = 1.0
    for rank in ranks.tolist():
        chance[rank:] += chance[:-rank].copy()
        chance /= 2
    return chance
