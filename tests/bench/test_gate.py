"""The error gate: what is wrong has no time, whatever it is."""

from __future__ import annotations

import pytest
import torch

from mosa_kernels.bench.gate import Expected


def expected(idle: bool = False) -> Expected:
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    eager = exact.to(torch.bfloat16)
    return Expected({"out": exact}, {"out": eager}, {"out": exact.abs() < 0.1} if idle else {})


def test_as_good_as_eager_is_green() -> None:
    verdict = expected().check({"out": expected().eager["out"]})
    assert verdict.green
    assert verdict.error == verdict.eager_error > 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda eager: eager * 1.02, "relative error"),
        (lambda eager: eager.float(), "expected"),
        (lambda eager: eager[:-1], "expected"),
        (lambda eager: torch.where(torch.arange(101) == 3, float("nan"), eager.float()).bfloat16(), "relative error"),
    ],
)
def test_everything_else_is_red(found, words: str) -> None:
    verdict = expected().check({"out": found(expected().eager["out"])})
    assert not verdict.green
    assert words in str(verdict.reason)
    assert "out" in str(verdict.reason)


def test_twice_the_error_is_allowed_and_no_more() -> None:
    exact = torch.ones(1000, dtype=torch.float64)
    eager = (exact + 1e-3).float()
    for error, green in ((1.9e-3, True), (2.1e-3, False)):
        assert Expected({"x": exact}, {"x": eager}, {}).check({"x": (exact + error).float()}).green is green


def test_the_reason_says_what_was_allowed_and_a_few_roundings_are() -> None:
    exact = torch.ones(1000, dtype=torch.float64)
    gate = Expected({"x": exact}, {"x": (exact + 1e-3).float()}, {})
    words = "x: relative error 0.003, eager PyTorch has 0.001, 0.002 is allowed"
    assert gate.check({"x": (exact + 3e-3).float()}).reason == words
    lucky = Expected({"x": exact}, {"x": exact.float()}, {})
    for error, green in ((5e-7, True), (2e-6, False)):
        assert lucky.check({"x": (exact + error).float()}).green is green


def test_one_wrong_entry_among_many_is_red() -> None:
    exact = torch.ones(100_000, dtype=torch.float64)
    eager = (exact + 1e-3).float()
    found = eager.clone()
    found[77] = 1.1
    verdict = Expected({"x": exact}, {"x": eager}, {}).check({"x": found})
    assert str(verdict.reason).startswith("x: an entry is off by 0.1")


def test_what_no_active_expert_owns_has_to_be_exactly_zero() -> None:
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    idle = {"w_up": torch.tensor([False, True])}
    gate = Expected({"w_up": exact}, {"w_up": exact.float()}, idle)
    assert gate.check({"w_up": torch.tensor([1.0, 0.0])}).green
    assert "exactly zero" in str(gate.check({"w_up": torch.tensor([1.0, 1e-20])}).reason)


def test_one_red_gradient_among_green_ones_is_named() -> None:
    exact = torch.ones(10, dtype=torch.float64)
    gate = Expected({"a": exact, "b": exact}, {"a": exact.float(), "b": exact.float()}, {})
    verdict = gate.check({"a": exact.float(), "b": exact.float() * 2})
    assert verdict.name == "b"
    assert not verdict.green
