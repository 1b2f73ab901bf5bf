"""Shared by all tests: reproducible draws, and Hypothesis profiles."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ["MOSA_CACHE"] = os.path.join(tempfile.gettempdir(), "mosa_kernels-no-tables")  # whatever was measured here
settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
