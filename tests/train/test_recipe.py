"""Recipes and the learning rate over a run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosa_kernels.train.job import Job
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.recipe import OFFICIAL, PAPER, Recipe, make_recipe
from mosa_kernels.train.schedule import Schedule
from mosa_kernels.train.setup import make_accelerator, make_trainer, open_splits, prepare


def test_paper_recipe_is_table_12():
    assert (PAPER.epochs, PAPER.warmup_epochs, PAPER.batch_size) == (100, 10, 128)
    assert (PAPER.alpha, PAPER.beta, PAPER.align, PAPER.expert_per) == (1, 1, "shallow", "batch")
    assert PAPER.lr == pytest.approx(PAPER.base_lr * 128 / 256)


def test_official_recipe_is_not_scaled_and_begins_with_an_epoch_at_zero():
    assert OFFICIAL.lr == OFFICIAL.base_lr
    assert (OFFICIAL.eps, OFFICIAL.dropout, OFFICIAL.seed, OFFICIAL.detach) == (1e-6, 0.1, 3407, True)
    rates = rates_of(OFFICIAL, updates_per_epoch=3)
    assert rates[:3] == [0, 0, 0]
    assert rates[3:6] == [rates[3]] * 3
    assert rates[3] > 0


def test_official_alignment_is_a_hundredth_over_the_depth_in_six_blocks():
    assert OFFICIAL.loss_options(12) == {"alpha": 1, "beta": 0.01 / 12, "align": "none", "detach_targets": True}
    on = make_recipe("official", regularisation="consistency+alignment")
    assert on.loss_options(12) == {
        "alpha": 1,
        "beta": 0.01 / 12,
        "align": (0, 1, 2, 3, 4, 5),
        "detach_targets": True,
    }
    assert on.loss_options(4)["align"] == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("recipe", "kind", "expected"),
    [
        ("paper", "none", (0, 1, "none")),
        ("paper", "consistency", (1, 1, "none")),
        ("paper", "consistency+alignment", (1, 1, "shallow")),
        ("official", "none", (0, 0.01, "none")),
        ("official", "consistency", (1, 0.01, "none")),
        ("official", "consistency+alignment", (1, 0.01, "first-six")),
    ],
)
def test_regularisation_is_a_row_of_table_7(recipe: str, kind: str, expected: tuple[float, float, str]):
    made = make_recipe(recipe, regularisation=kind)
    assert (made.alpha, made.beta, made.align) == expected
    assert made.regularisation == kind


def test_regularisation_yields_to_what_is_said_beside_it():
    assert make_recipe("paper", regularisation="consistency+alignment", align="deep").align == "deep"
    assert make_recipe("paper", regularisation="consistency", alpha=0.5).alpha == 0.5


def test_a_large_backbone_trains_half_as_long_on_half_the_batch():
    for name in ("paper", "official"):
        large = make_recipe(name, "vit_large_patch16_224.orig_in21k")
        assert (large.batch_size, large.epochs, large.warmup_epochs) == (64, 50, 10)
        assert make_recipe(name, "vit_base_patch16_224.orig_in21k") == make_recipe(name)
    assert make_recipe("paper", "vit_large_patch16_224", epochs=10).warmup_epochs == 2
    assert make_recipe("paper", "vit_large_patch16_224", batch_size=32).batch_size == 32


def test_the_reported_mechanism():
    assert PAPER.reported == "mean"
    assert make_recipe("paper", merge_rule="jigsaw").reported == "jigsaw"
    assert make_recipe("paper", merge_rule="jigsaw", inference="ensemble").reported == "ensemble"


def rates_of(recipe: Recipe, updates_per_epoch: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=recipe.lr)
    schedule = Schedule(optimizer, recipe, updates_per_epoch)
    rates = []
    for update in range(recipe.epochs * updates_per_epoch):
        schedule.set(update)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@given(
    epochs=st.integers(2, 30),
    share=st.floats(0, 0.9),
    updates=st.integers(1, 7),
    lr=st.floats(1e-5, 1.0),
)
def test_schedule_is_the_formula(epochs: int, share: float, updates: int, lr: float):
    recipe = make_recipe("paper", lr=lr, epochs=epochs, warmup_epochs=share * epochs)
    total, warm = epochs * updates, round(share * epochs * updates)
    expected = [
        lr * t / warm if t < warm else lr * (1 + math.cos(math.pi * (t - warm) / (total - warm))) / 2
        for t in range(total)
    ]
    assert rates_of(recipe, updates) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("epochs", "still"), [(1, 0), (2, 1), (4, 1), (30, 3)])
def test_the_released_codes_first_epoch_runs_at_zero_however_short_the_run(epochs: int, still: int):
    rates = rates_of(make_recipe("official", epochs=epochs), 3)
    assert rates[:3] == ([0.0] * 3 if still else [OFFICIAL.lr] * 3)
    assert all(rate > 0 for rate in rates[3:])


@pytest.mark.parametrize(("epochs", "warmup", "updates"), [(1, 0.0, 1), (2, 1.0, 1), (1, 0.5, 2)])
def test_a_single_update_at_the_peak_is_no_matter_for_a_warning(
    epochs: int, warmup: float, updates: int, caplog: pytest.LogCaptureFixture
):
    recipe = make_recipe("paper", epochs=epochs, warmup_epochs=warmup)
    assert rates_of(recipe, updates)[-1] == recipe.lr
    assert not caplog.records


def test_schedule_may_be_entered_anywhere():
    recipe = make_recipe("paper", epochs=8)
    whole = rates_of(recipe, 5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=recipe.lr)
    schedule = Schedule(optimizer, recipe, 5)
    schedule.set(27)
    assert optimizer.param_groups[0]["lr"] == whole[27]


def test_overrides():
    recipe = make_recipe("paper", epochs=20, batch_size=64, base_lr=0.01, dropout=None)
    assert recipe.warmup_epochs == 2
    assert recipe.lr == pytest.approx(0.0025)
    assert recipe.dropout == PAPER.dropout
    assert make_recipe("paper", lr=0.3, batch_size=64).lr == 0.3


def test_a_recipe_survives_json():
    for recipe in (PAPER, OFFICIAL, make_recipe("paper", lr=0.1, clip_norm=1.0)):
        assert Recipe(**recipe.as_dict()) == recipe
        assert {field.name for field in dataclasses.fields(Recipe)} == set(recipe.as_dict())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("papre", {}, "recipe: expected one of paper, official, got 'papre'"),
        ("paper", {"lr": 1.0, "base_lr": 1.0}, "lr, base_lr: expected one of them, got both"),
        ("paper", {"epochs": 0}, "epochs: expected at least 1, got 0"),
        ("paper", {"epochs": 5, "warmup_epochs": 5}, "warmup_epochs: expected at least 0 and less than the 5 epochs"),
        ("paper", {"dropout": 1.0}, "dropout: expected 0 <= p < 1"),
        ("paper", {"align": "top"}, "align: expected one of none, shallow, deep, all, first-six, got 'top'"),
        ("paper", {"base_lr": float("nan")}, "base_lr: expected a finite number of at least 0, got nan"),
        ("paper", {"weight_decay": float("inf")}, "weight_decay: expected a finite number of at least 0, got inf"),
        ("paper", {"clip_norm": float("inf")}, "clip_norm: expected a positive number or None, got inf"),
        ("paper", {"momentum": 0.9}, "got momentum"),
        ("paper", {"inference": "best"}, "inference: expected one of merged, stochastic, fixed, ensemble, got 'best'"),
        ("paper", {"regularisation": "l2"}, "regularisation: expected one of none, consistency, consistency"),
        ("paper", {"clip_norm": 0.0}, "clip_norm: expected a positive number"),
    ],
)
def test_bad_numbers_are_refused_by_name(name: str, overrides: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        make_recipe(name, **overrides)


def test_the_test_reports_the_mechanism_that_was_asked_for(tiny: Any, tmp_path: Path):
    settings = tiny(epochs=1, inference="ensemble")
    result = Job(settings, tmp_path / "run", False, Reporter()).run()
    assert result["reported"] == "ensemble"
    assert result["accuracy"] == result["test"]["ensemble"]["accuracy"]
    assert set(result["test"]) == {"mean", "jigsaw", "stochastic", "ensemble"}
    assert "image files (36 .png)" in result["data_format"]
    assert len(result["backbone_sha256"]) == 64
    assert result["normalisation"]["mean"]


def test_an_epoch_is_not_chosen_by_images_that_were_trained_on(tiny: Any):
    settings = tiny(epochs=1)
    splits = dataclasses.replace(open_splits(settings, 32), validation_in_train=True)
    with pytest.raises(ValueError, match=r"select: expected last, got best: .* trains on its validation images"):
        prepare(settings, splits=splits)
    prepare(dataclasses.replace(settings, recipe=dataclasses.replace(settings.recipe, select="last")), splits=splits)


def test_first_six_blocks_reach_the_loss(tiny: Any):
    settings = tiny(epochs=1, align="first-six", beta=0.01, beta_over_depth=True)
    trainer = make_trainer(settings, prepare(settings), make_accelerator(settings), Reporter())
    criterion = trainer.objective.criterion
    assert criterion is not None
    assert (criterion.align, criterion.beta) == ((0, 1, 2, 3), 0.01 / 4)
