"""The demo's comparison: what its tables and its sentence say follows from the numbers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import pytest

from mosa_kernels.train import comparison
from mosa_kernels.train.comparison import CONTENDERS, DEMO, Outcome, chosen_numbers, demo_settings
from mosa_kernels.train.comparison_report import (
    markdown_table,
    rows_of_mechanisms,
    rows_of_methods,
    summarise,
    verdict,
)
from mosa_kernels.train.methods import AdapterOptions
from mosa_kernels.train.recipe import Recipe


def outcome(key: str, seed: int, accuracy: float, **changes: Any) -> Outcome:
    contender = next(c for c in CONTENDERS if c.key == key)
    measured = {"plain": {"accuracy": accuracy, "nll": 1.5}}
    if contender.method == "mosa":
        measured = {name: {"accuracy": accuracy, "nll": 1.5} for name in ("mean", "jigsaw", "stochastic")}
    fields: dict[str, Any] = {
        "contender": contender,
        "seed": seed,
        "measured": measured,
        "reported": "mean" if contender.method == "mosa" else "plain",
        "trained": 100,
        "stored": 90,
        "seconds": 2.0,
        "rows": [],
        "merge": None,
    }
    return Outcome(**{**fields, **changes})


def outcomes(**accuracies: tuple[float, ...]) -> list[Outcome]:
    return [outcome(key.replace("_", "-"), seed, a) for key, row in accuracies.items() for seed, a in enumerate(row)]


def test_summaries_are_means_and_sample_deviations():
    (summary,) = summarise(outcomes(mosa_rising=(60.0, 64.0, 65.0)))
    assert summary.accuracy == pytest.approx(63)
    assert summary.spread == pytest.approx(statistics.stdev((60, 64, 65)))
    assert summary.mechanisms["jigsaw"]["accuracy"] == pytest.approx(63)


def test_the_order_of_runs_does_not_matter():
    runs = outcomes(adaptformer=(60.0, 64.0), mosa_rising=(61.0, 70.0))
    assert verdict(summarise(runs)) == verdict(summarise(runs[:1] + runs[2:3] + runs[:0:-1][:1] + runs[1:2]))


def test_the_sentence_names_the_winner_and_does_not_flatter_mosa():
    said = verdict(summarise(outcomes(adaptformer=(60, 61, 62), dropout=(70, 71, 72), mosa_rising=(65, 66, 67))))
    assert said.startswith("AdaptFormer + dropout has the highest accuracy here, 71.0 ± 1.0 %")
    assert "5.0 points behind AdaptFormer + dropout (more than two standard errors" in said
    assert "5.0 points ahead of AdaptFormer (more than two standard errors of 0.0; ahead in 3 of 3 seeds)" in said


def test_a_lead_within_the_spread_is_said_to_be_one():
    said = verdict(summarise(outcomes(adaptformer=(60, 66, 63), mosa_batch=(62, 63, 66))))
    assert said.startswith("MoSA, expert per batch (paper) has the highest accuracy here, 63.7")
    assert "0.7 points ahead of AdaptFormer (less than two standard errors" in said
    assert "ahead in 2 of 3 seeds" in said


def test_one_seed_has_no_spread():
    assert "(one seed: no spread known)" in verdict(summarise(outcomes(adaptformer=(60,), mosa_batch=(62,))))


def test_tables_are_complete():
    summaries = summarise(outcomes(linear=(50, 51), adaptformer=(60, 61), mosa_batch=(62, 64)))
    methods, mechanisms = rows_of_methods(summaries), rows_of_mechanisms(summaries)
    assert [row[0] for row in methods[1:]] == ["linear probing", "AdaptFormer", "MoSA, expert per batch (paper)"]
    assert {len(row) for row in methods} == {6}
    shown = {row[0]: row[1] for row in mechanisms[1:]}
    assert shown["merged by mean"] == "63.0 ± 1.4"
    assert shown["one fixed expert (average of N)"] == "-"
    text = markdown_table(methods)
    assert text.count("\n") == len(methods)
    assert all(line.startswith(("| ", "|-")) for line in text.splitlines())


def test_the_shipped_choice_is_the_best_of_what_was_tried():
    record = json.loads(comparison.CHOSEN.read_text())
    assert record["chosen"].keys() == {contender.key for contender in CONTENDERS}
    for contender in CONTENDERS:
        tried = [row for row in record["tried"] if row["method"] == contender.key]
        best = max(tried, key=lambda row: row["accuracy"])
        assert {name: best[name] for name in contender.tuned} == record["chosen"][contender.key]
        assert len({row["base_lr"] for row in tried}) >= 2
    assert Recipe(**record["recipe"]) == DEMO  # toggles newer than the record have the values that it was made with
    assert "validation" in record["protocol"]
    assert all({"method", "seeds", "accuracy"} <= row.keys() for row in record["explored"])
    assert not {seed for row in record["explored"] for seed in row["seeds"]} & {0, 1, 2}
    assert record["history"]


def test_final_seeds_were_not_tuned_on():
    from mosa_kernels.cli.demo import SEEDS

    protocol = json.loads(comparison.CHOSEN.read_text())["protocol"]
    assert not [seed for seed in SEEDS if f" {seed}," in protocol or f"[{seed}," in protocol]


def test_each_run_has_its_own_data_and_initial_seed():
    numbers = chosen_numbers()
    settings = [demo_settings(c, numbers[c.key], seed) for c in CONTENDERS for seed in (0, 1)]
    assert {s.data_seed for s in settings} == {0, 1}
    assert all(s.recipe.seed != s.data_seed for s in settings)
    by_key = {c.key: demo_settings(c, numbers[c.key], 0) for c in CONTENDERS}
    assert by_key["mosa-batch"].recipe.expert_per == "batch"
    assert by_key["mosa-rising"].recipe.expert_per == "sample"
    assert (by_key["mosa-batch"].recipe.alpha, by_key["mosa-batch"].recipe.beta) == (1, 1)
    assert by_key["dropout-two-pass"].recipe.beta == 0
    adapters = {c.key: s.adapter for c, s in zip(CONTENDERS, settings[::2], strict=True) if s.method != "linear"}
    by_adapter = dict(adapters)
    anchored = adapters.pop("mosa-anchored")
    assert (anchored.anchored, anchored.expert_scale, anchored.num_experts) == (True, "N", 2)
    rising = adapters.pop("mosa-rising")
    assert (rising.expert_scale, rising.num_experts) == ("N", "1:4")
    assert all(adapter.scale == numbers[key]["scale"] for key, adapter in by_adapter.items())
    usual = AdapterOptions(style="adaptformer", bottleneck=64)
    assert {dataclasses.replace(adapter, scale=None) for adapter in adapters.values()} == {usual}
    assert {anchored.bottleneck, rising.bottleneck} == {64}
