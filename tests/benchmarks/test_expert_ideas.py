"""Ideas about experts: the rules that choose them, and the comparison in small."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import typer
from script_modules import load_script

import mosa_kernels as mk
from mosa_kernels.data.backbone import load_offline_backbone
from mosa_kernels.nn.sampler import samplers

expert_ideas = load_script("benchmarks/expert_ideas.py")

TASK = "digits, 10 labels a class"


def model_of(experts: int = 2, *, expert_bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    model = load_offline_backbone(4)
    mk.inject_adapter(
        model, mk.MoSAConfig(bottleneck=4, num_experts=experts, expert_scale="N", expert_bias=expert_bias)
    )
    for projection in expert_ideas.split_projections(model):
        torch.nn.init.normal_(projection.weight, std=0.02)
    return model.train()


def trainer_at(epoch: int, model: torch.nn.Module | None = None, batches: list | None = None) -> SimpleNamespace:
    """What the rules look at, after so many of eight epochs."""
    return SimpleNamespace(
        progress=SimpleNamespace(epochs_done=epoch),
        recipe=SimpleNamespace(epochs=8),
        model=model,
        loaders=SimpleNamespace(train=batches),
    )


def test_the_rules_choose_by_time_and_class() -> None:
    labels = torch.arange(6)
    assert [expert_ideas.merged_first(labels, trainer_at(epoch)) for epoch in (0, 1, 2, 7)] == [-1, -1, None, None]
    assert [expert_ideas.merged_last(labels, trainer_at(epoch)) for epoch in (0, 5, 6, 7)] == [None, None, -1, -1]
    trainer = trainer_at(0, model_of(3))
    assert expert_ideas.by_class(labels, trainer).tolist() == [0, 1, 2, 0, 1, 2]
    assert expert_ideas.by_class_then_merged(labels, trainer_at(7, trainer.model)) == -1


def test_experts_join_and_part_by_schedule() -> None:
    model = model_of(4, expert_bias=False)
    layers = expert_ideas.adapters(model)
    finest = [layer.up.assignment.clone() for layer in layers]
    dense = [layer.merge().up.weight for layer in layers]
    x = torch.randn(2, 5, layers[0].dim)
    falling = expert_ideas.Counts(4, 2, 1)
    for epoch, count in ((0, 4), (2, 4), (3, 2), (5, 2)):
        assert falling(torch.arange(2), trainer_at(epoch, model)) is None
        for layer, owners, merged in zip(layers, finest, dense, strict=True):
            assert {layer.num_experts, layer.sampler.choices, layer.expert_scale} == {count}
            assert layer.up.assignment.equal(owners // (4 // count))
            torch.testing.assert_close(layer.merge().up.weight, merged)
            alone = [layer(x, expert=expert, add_input=False) for expert in range(count)]
            torch.testing.assert_close(sum(alone) / count, layer(x, expert=-1, add_input=False))
    assert [falling(torch.arange(2), trainer_at(epoch, model)) for epoch in (6, 7)] == [-1, -1]
    torch.testing.assert_close(layers[0].merge().up.weight, dense[0])

    model = model_of(4, expert_bias=False)
    rising = expert_ideas.Counts(1, 2, 4)
    assert [rising(torch.arange(2), trainer_at(epoch, model)) for epoch in (0, 2, 3)] == [-1, -1, None]
    assert expert_ideas.experts_of(model) == 2
    assert rising(torch.arange(2), trainer_at(6, model)) is None
    assert all(
        layer.up.assignment.equal(owners) for layer, owners in zip(expert_ideas.adapters(model), finest, strict=True)
    )


def test_a_directed_objective_runs_the_experts_that_its_rule_names() -> None:
    model, seen = model_of(), []

    def objective(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
        (assigned,) = {each.assigned for each in samplers(model)}
        seen.append(None if assigned is None else assigned.tolist())
        return {"loss": images.sum()}, images

    labels = torch.tensor([3, 0, 1])
    for epoch, rule in ((0, expert_ideas.by_class), (0, expert_ideas.merged_first), (4, expert_ideas.merged_first)):
        expert_ideas.Directed(objective, rule, trainer_at(epoch, model))(model, torch.ones(3, 1), labels)
    assert seen == [[1, 0, 1], -1, None]
    assert all(each.assigned is None for each in samplers(model))


def test_each_expert_owns_the_half_that_its_classes_pull_at() -> None:
    model = model_of()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    projections = expert_ideas.split_projections(model)
    before = [each.assignment.clone() for each in projections]
    expert_ideas.assign_by_pull(trainer_at(2, model, [(images, labels)]))
    pull = []
    for expert in range(2):
        mine = labels % 2 == expert
        with mk.experts_per_sample(model, -1):
            loss = F.cross_entropy(model(images[mine]), labels[mine])
        pull.append(torch.autograd.grad(loss, [each.weight for each in projections]))
    for number, (each, old) in enumerate(zip(projections, before, strict=True)):
        owner = each.assignment
        assert owner.dtype == torch.uint8
        assert abs(int(owner.sum()) - owner.numel() / 2) <= 0.5
        assert (owner != old).any()
        ratio = pull[1][number].abs() / pull[0][number].abs()
        assert ratio[owner == 0].max() <= ratio[owner == 1].min() * 1.001
    with pytest.raises(ValueError, match="a learned assignment is for 2 experts, got 3"):
        expert_ideas.assign_by_pull(trainer_at(2, model_of(3), []))


def test_a_comparison_is_written_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = {"idea": ["anchored-learned"], "task": [TASK], "bottleneck": 4, "epochs": 4, "seeds": 1, "workers": 1}
    expert_ideas.main(tmp_path, lr=0.01, table="ours-3", **options)
    record = json.loads((tmp_path / "ideas.json").read_text())
    assert set(record["measured"]) == {"anchored", "anchored-learned"}
    what = f"--idea anchored-learned --table ours-3 --task '{TASK}' --lr 0.01 --bottleneck 4 --epochs 4 --seeds 1"
    assert record["command"] == f"python benchmarks/expert_ideas.py OUTPUT {what}"
    assert f"`{record['command']}`, " in (tmp_path / "ideas.md").read_text()
    (difference,) = record["differences"]
    learned, random = (record["measured"][key][TASK][0] for key in ("anchored-learned", "anchored"))
    assert difference["points"] == pytest.approx([learned - random])
    assert "which own what their classes pull at" in (tmp_path / "ideas.md").read_text()
    assert (tmp_path / "ideas.png").stat().st_size > 1000

    (cell,) = (tmp_path / "cells").glob("anchored-learned-*.json")
    changed = json.loads(cell.read_text())
    changed["measured"]["mean"]["accuracy"] = 12.5
    cell.write_text(json.dumps(changed))
    expert_ideas.main(tmp_path, lr=0.01, table="ours-3", **options)
    again = json.loads((tmp_path / "ideas.json").read_text())
    assert again["measured"]["anchored-learned"][TASK] == [12.5]  # read, not run again


def runs_of(table: str, task: str, ideas=expert_ideas.IDEAS, seeds=(0,)) -> list:
    compared = expert_ideas.chosen_tasks(expert_ideas.chosen_table(table), [task])
    numbers = expert_ideas.chosen_numbers(compared, ideas)
    return expert_ideas.make_runs(compared, ideas, numbers, seeds, expert_ideas.Changes())


def test_every_idea_is_a_run_of_its_own() -> None:
    runs, scaled = runs_of("ours-2", TASK), runs_of("ours-3", TASK)
    for each in (runs, scaled):
        assert len({(run.cell.identity, run.choose) for run in each}) == len(expert_ideas.IDEAS)
    assert not {run.cell.identity for run in runs} & {run.cell.identity for run in scaled}
    further = runs_of("ours-2", TASK, expert_ideas.IDEAS[:1], range(8, 10))
    assert [run.cell.settings.data_seed for run in further] == [8, 9]
    layers = {run.idea: run.cell.settings.adapter.num_experts for run in runs}
    assert (layers["deep"], layers["random"]) == ((1, 1, 2, 2), 2)


def test_each_idea_has_what_validation_chose_in_the_table() -> None:
    def numbers(table: str, task: str) -> dict[str, tuple[float, float, float]]:
        settings = {run.idea: run.cell.settings for run in runs_of(table, task)}
        return {key: (each.recipe.lr, each.adapter.scale, each.recipe.dropout) for key, each in settings.items()}

    there = numbers("ours-2", "count")
    assert (there["random"], there["dropout"]) == ((0.03, None, 0.0), (0.03, None, 0.1))
    there = numbers("ours-3", TASK)
    assert {there[key] for key in ("random", "rising", "anchored-class")} == {(0.01, 2.5, 0.0)}
    assert there["dropout-rising"] == (0.01, 2.5, "0:0.3")
    assert (there["dropout"], there["dropout-two-pass"]) == ((0.01, 1.0, 0.3), (0.01, 2.5, 0.1))
    there = numbers("ours-3", "count")
    assert (there["adaptformer"], there["dropout"]) == ((0.01, 1.0, 0.0), (0.01, 1.0, 0.1))
    assert (there["rising"], there["dropout-rising"]) == ((0.01, 2.5, 0.0), (0.01, 1.0, "0:0.3"))
    there = numbers("ours-4", "20 labels a class, 40 % wrong")
    assert (there["rising"], there["dropout-two-pass"]) == ((0.01, 2.5, 0.0), (0.01, 2.5, 0.4))
    there = numbers("ours-5", "weaves, 5 labels a class")
    assert (there["rising"], there["anchored"]) == ((0.01, 1.0, 0.0), (0.003, 1.0, 0.0))

    counting = expert_ideas.chosen_tasks(expert_ideas.chosen_table("ours-3"), ["count"])
    controls = expert_ideas.chosen_ideas(["adaptformer", "dropout-two-pass"])
    told = expert_ideas.told_numbers(controls, counting.tasks, expert_ideas.chosen_numbers(counting, controls))
    assert told == (
        "Every row has lr 0.01, scale 1, as validation chose it for the first; AdaptFormer + dropout, two passes + KL: "
        "lr 0.01, scale 1, dropout 0.1."
    )


def test_wrong_words_are_named() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected some of random, .* got best"):
        expert_ideas.chosen_ideas(["best"])
    with pytest.raises(typer.BadParameter, match=r"expected some of digits, .* got digits"):
        expert_ideas.chosen_tasks(expert_ideas.chosen_table("ours-2"), ["digits"])
    with pytest.raises(typer.BadParameter, match=r"expected one of ours-2, .* got ours-1"):
        expert_ideas.chosen_table("ours-1")
