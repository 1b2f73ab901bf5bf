"""Checks of options, wherever they are given: each error names the option, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: not one of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: Any, most: int | None = None) -> None:
    """
    Raises:
        TypeError: no whole number.
        ValueError: less than one, or more than `most`.
    """
    check_whole(name, value)
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: expected at least 1{'' if most is None else f' and at most {most}'}, got {value}")


def check_whole(name: str, value: Any, expected: str = "a whole number") -> None:
    """
    Raises:
        TypeError: no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def check_seed(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: no whole number.
        ValueError: PyTorch's generators do not take it.
    """
    check_whole(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a whole number of 64 bits, got {value}")


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_number(name: str, value: Any, expected: str = "a number") -> None:
    """
    Raises:
        TypeError: no number.
        ValueError: infinite, or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected {expected} that is finite, got {value!r}")


def check_expert_scale(value: Any) -> None:
    """
    Raises:
        TypeError: neither a number nor "N".
        ValueError: infinite, or not above 0.
    """
    if value == "N":
        return
    check_number("expert_scale", value, "a number or 'N'")
    if value <= 0:
        raise ValueError(f"expert_scale: expected a positive number or 'N', got {value!r}")


def check_placement(device: Any, dtype: Any) -> None:
    """Where weights are made, and in which dtype; None is PyTorch's default.

    Raises:
        TypeError: `device` or `dtype` is of another type, or integers are asked for, which do not train.
        ValueError: PyTorch knows no such device.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")
    if device is None:
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = ValueError if isinstance(device, str) else TypeError
        raise kind(f"device: expected one that PyTorch knows, such as cpu or cuda:0, got {device!r}") from error


def check_probability(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: no number.
        ValueError: below 0, or not below 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected 0 <= p < 1, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected 0 <= p < 1, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: no number.
        ValueError: negative, infinite, or not a number.
    """
    expected = "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_expert(name: str, value: Any, count: int, expected: str = "a number") -> None:
    """
    Args:
        count: how many experts there are.
        expected: what the option takes, for the message.

    Raises:
        TypeError: no whole number.
        ValueError: there is no such expert.
    """
    expected = f"{expected} from 0 to {count - 1}"
    check_whole(name, value, expected)
    if not 0 <= value < count:
        raise ValueError(f"{name}: expected {expected}, got {value}")
