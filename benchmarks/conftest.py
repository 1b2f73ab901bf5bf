"""Lets `pytest benchmarks/ --benchmark-only` find the stems, and gives each its cases.

pytest benchmarks/ --benchmark-only                  all stems, on the cases of MOSA_BENCH_PRESET (smoke)
pytest benchmarks/bench_merge.py --benchmark-only    one
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mosa_kernels.bench.case import Case, Provider
from mosa_kernels.bench.kernels import Effort, admit, cases
from mosa_kernels.bench.model import admit_variant, settings
from mosa_kernels.bench.model_variants import Shop, Variant
from mosa_kernels.bench.records import name_of
from mosa_kernels.bench.shapes import points

DEVICE = torch.device("cpu")
PRESET = os.environ.get("MOSA_BENCH_PRESET", "smoke")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects what the command line names
    if file_path.match("bench_*.py") and file_path.parent == Path(__file__).parent and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider of every case of the stem's OPERATOR, or every variant of the models."""
    if "provider" in metafunc.fixturenames:
        found = cases((metafunc.module.OPERATOR,), points(PRESET, DEVICE.type), DEVICE, Effort())
        parameters = [(case, provider) for case in found for provider in case.providers()]
        ids = [f"{provider.name}: {name_of(case.key)}" for case, provider in parameters]
        metafunc.parametrize(("case", "provider"), parameters, ids=ids)
    if "variant" in metafunc.fixturenames:
        shops = [Shop(setting, DEVICE) for setting in settings(PRESET, DEVICE.type)]
        variants = [(shop, variant) for shop in shops for variant in shop.variants()]
        ids = [f"{variant.part}: {variant.name}" for _, variant in variants]
        metafunc.parametrize(("shop", "variant"), variants, ids=ids)


@pytest.fixture
def run(case: Case, provider: Provider) -> Callable[[], object]:
    """The provider's call, once its results have passed the error gate."""
    row: dict[str, Any] = {}
    prepared = admit(case, provider, row)
    return _admitted(row, None if prepared is None else prepared.run)


@pytest.fixture
def step(shop: Shop, variant: Variant) -> Callable[[], object]:
    """A training step or an inference, once its logits have passed the error gate."""
    row, made = admit_variant(shop, variant)
    return _admitted(row, None if made is None else made.run)


def _admitted(row: dict[str, Any], call: Callable[[], object] | None) -> Callable[[], object]:
    if row["status"] == "unavailable":
        pytest.skip(row["reason"])
    assert call is not None, row["reason"]
    return call
