"""Class names: when two data sets mean the same by a label."""

from __future__ import annotations

import pytest

from mosa_kernels.data.classes import differing_classes


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (("cat", "dog"), ("cat", "dog")),
        (("cat", "dog"), ("0", "1")),  # a reader that knows no names
        (("0", "1"), ("cat", "dog")),
        (("0", "1"), ("0", "1")),
    ],
)
def test_the_same_names_and_mere_numbers_agree(before: tuple[str, ...], now: tuple[str, ...]):
    assert differing_classes(before, now) == ""


def test_the_first_differences_are_named():
    assert differing_classes(("a", "cat"), ("a", "dog")) == "label 1 was 'cat' and is 'dog'"
    many = differing_classes(tuple("abcdef"), tuple("ghijkf"))
    assert many == "label 0 was 'a' and is 'g', label 1 was 'b' and is 'h', label 2 was 'c' and is 'i' and 2 more"


def test_another_order_is_said_also_of_numbers():
    """Folders are sorted by name: 10 comes before 2."""
    by_name, by_value = sorted(map(str, range(12))), tuple(map(str, range(12)))
    assert differing_classes(by_name, by_value).endswith("and 7 more (the same classes in another order)")
