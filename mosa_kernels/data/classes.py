"""Class names: whether there are several, and whether two data sets mean the same by a label."""

from __future__ import annotations

from collections.abc import Sequence

_NAMED = 3  # how many labels an error names


def refuse_one_class(source: object, classes: Sequence[str], where: str = "", advice: str = "") -> None:
    """Refuses a single class, which everybody would have right.

    Args:
        source: what was read, for the message.
        classes: the names.
        where: classes are looked for, for the message.
        advice: what to do, for the message.

    Raises:
        ValueError: there is one.
    """
    if len(classes) == 1:
        raise ValueError(
            f"{source}: expected at least 2 classes"
            + (f", {where}" if where else "")
            + f", got {classes[0]} alone"
            + (f"; {advice}" if advice else "")
        )


def differing_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """Where two data sets with as many classes mean other things by their labels, in words; "" where they do not.

    Args:
        before, now: class names, in the order of the labels. Lists that hold numbers alone, as some readers make
            them, say nothing of what the numbers mean: they differ from other numbers only.
    """
    if mere_numbers(before) != mere_numbers(now):
        return ""
    other = [label for label, (one, two) in enumerate(zip(before, now, strict=True)) if one != two]
    if not other:
        return ""
    words = ", ".join(f"label {label} was {before[label]!r} and is {now[label]!r}" for label in other[:_NAMED])
    more = f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
    order = " (the same classes in another order)" if sorted(before) == sorted(now) else ""
    return f"{words}{more}{order}"


def mere_numbers(names: Sequence[str]) -> bool:
    """Whether the names are mere numbers."""
    return all(name.isdecimal() for name in names)
