"""Small runs: the offline backbone on fifteen pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pictures import make_pictures

from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.train.methods import AdapterOptions
from mosa_kernels.train.recipe import make_recipe
from mosa_kernels.train.settings import Settings


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def tiny(pictures: Path) -> Any:
    """Settings of a run of seconds; keywords go to the recipe, or replace settings."""

    def make(**changes: Any) -> Settings:
        fields = {field.name for field in dataclasses.fields(Settings)}
        own = {key: changes.pop(key) for key in list(changes) if key in fields}
        recipe = make_recipe("paper", **{"epochs": 3, "batch_size": 5, "lr": 0.02, "dropout": 0.2, **changes})
        base: dict[str, Any] = {"model": OFFLINE_BACKBONE, "data": str(pictures), "cpu": True, "recipe": recipe}
        base["adapter"] = AdapterOptions(bottleneck=8, num_experts=2)
        return Settings(**{**base, **own})

    return make
