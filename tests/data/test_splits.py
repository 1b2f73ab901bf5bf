"""Parts held out of a training set, class by class."""

from __future__ import annotations

import numpy as np
import pytest

from mosa_kernels.data.splits import stratified_parts


@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (10, [0.2], [8, 2]),
        (10, [0.2, 0.3], [5, 2, 3]),
        (2, [0.01], [1, 1]),
        (2, [0.9], [1, 1]),
        (3, [0.3, 0.6], [1, 1, 1]),
        (4, [0.3, 0.6], [1, 1, 2]),
        (20, [0.49, 0.49], [1, 9, 10]),
    ],
)
def test_every_part_has_its_share_of_each_class_and_the_first_what_remains(
    count: int, shares: list[float], sizes: list[int]
) -> None:
    labels = np.random.default_rng(0).permutation(np.arange(3 * count) % 3)
    parts = stratified_parts(labels, shares, ["a", "b", "c"], seed=5)
    assert sorted(np.concatenate(parts).tolist()) == list(range(3 * count))
    for part, size in zip(parts, sizes, strict=True):
        assert (np.diff(part) > 0).all()
        assert sorted(np.bincount(labels[part])) == [size] * 3
    others = stratified_parts(labels, shares, ["a", "b", "c"], seed=6)
    assert any(not np.array_equal(part, other) for part, other in zip(parts, others, strict=True)) or count < 3
