"""Which backend runs an operator that several offer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.functional import alignment, consistency, masked_adamw, merge


def backend(name: str, available: bool = True, takes: bool = True) -> Backend:
    def load() -> Any:
        assert available, "imported although it is not available"
        return SimpleNamespace(
            double=lambda value: (name, 2 * value),
            supports_double=lambda value: (takes and value > 0, f"{name} takes no {value}"),
        )

    return Backend(lambda: (available, f"{name} is not there"), load)


OPERATOR = Operator(
    "double",
    {
        "reference": backend("reference"),
        "absent": backend("absent", available=False),
        "picky": backend("picky", takes=False),
        "fast": backend("fast"),
    },
    {"gpu": ("absent", "picky", "fast")},
)


def test_the_first_that_can_runs() -> None:
    assert OPERATOR.choose("gpu", None, 3) == "fast"
    assert OPERATOR.run("fast", 3) == ("fast", 6)
    assert OPERATOR.choose("gpu", None, -3) == "reference"
    assert OPERATOR.choose("other device", None, 3) == "reference"


def test_a_name_is_kept_or_refused_with_the_reason() -> None:
    assert OPERATOR.choose("other device", "fast", 3) == "fast"
    for name, reason in (("absent", "absent is not there"), ("picky", "picky takes no 3")):
        with pytest.raises(ValueError, match=f"backend: '{name}' does not take this call: {reason}"):
            OPERATOR.choose("gpu", name, 3)
    with pytest.raises(ValueError, match="backend: expected one of reference, absent, picky, fast or None, got 'tpu'"):
        OPERATOR.choose("gpu", "tpu", 3)


@pytest.mark.parametrize("operator", [alignment.OPERATOR, consistency.OPERATOR, masked_adamw.OPERATOR, merge.OPERATOR])
def test_every_operator_has_a_definition_and_says_why_a_backend_is_not_available(operator: Operator) -> None:
    assert operator.backends["reference"].available() == (True, "")
    assert set(operator.order) <= {"cpu", "cuda"}
    for order in operator.order.values():
        assert set(order) <= operator.backends.keys() - {"reference"}
    for known in operator.backends.values():
        ok, reason = known.available()
        assert ok or len(reason) > 10
        if ok:
            assert callable(getattr(known.load(), f"supports_{operator.name}"))
