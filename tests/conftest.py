"""Shared by all tests: reproducible draws, and Hypothesis profiles."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, is_hypothesis_test, settings

os.environ["MOSA_CACHE"] = os.path.join(tempfile.gettempdir(), "mosa_kernels-no-tables")  # whatever was measured here
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
# On a GPU every shape of a call is compiled first. No test has more examples than this, whatever it asks for.
settings.register_profile("gpu", settings.get_profile("ci"), max_examples=10)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PROFILE == "gpu":
        for item in items:
            test = getattr(item, "function", None)
            if is_hypothesis_test(test):
                _limit_examples(test)


def _limit_examples(test: Any) -> None:
    # Hypothesis has no public way to change what a test's own @settings say.
    own = test._hypothesis_internal_use_settings
    most = min(own.max_examples, settings.default.max_examples)
    test._hypothesis_internal_use_settings = settings(own, max_examples=most)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
