"""The record of the paper's tables: complete, consistent with itself, and what it asks of a run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from mosa_kernels.data.published import FGVC, GICD, VTAB, names_of
from mosa_kernels.train.folder import write_json
from mosa_kernels.train.methods import METHODS
from mosa_kernels.train.recipe import make_recipe
from mosa_kernels.train.table_cells import Cell
from mosa_kernels.train.table_grid import FIRST_TUNING_SEED, Choice, Grid
from mosa_kernels.train.table_spec import (
    Changes,
    Row,
    Task,
    candidates,
    cell_settings,
    read_spec,
    read_table,
    table_numbers,
    tuned_row,
    why_not,
)

# Tables of ours that give the controls more to choose from.
OWN_CONTROLS = {
    "14": ("dropout", "dropout-two-pass", "dropout-houlsby", "dropout-two-pass-houlsby"),
    "ours-2": ("adaptformer-scaled", "dropout-wide", "dropout-two-pass-wide"),
    "ours-3": ("adaptformer-own-scale", "dropout-own-scale", "dropout-two-pass-own-scale"),
    "ours-4": ("adaptformer-own-scale", "dropout-own-scale", "dropout-two-pass-own-scale"),
    "ours-5": ("adaptformer-own-scale", "dropout-own-scale", "dropout-two-pass-own-scale"),
    **dict.fromkeys(
        ("ours-6", "ours-7"),
        (
            "adaptformer-own-scale",
            "dropout-own-scale",
            "dropout-two-pass-own-scale",
            "dropout-rising-two-pass-own-scale",
        ),
    ),
}
# Rows whose printed mean is not the mean of the printed columns, and what that mean is.
MISPRINTS = {("1", "vpt-shallow"): 84.66, ("2", "vpt-shallow"): 67.82, ("2", "vpt-deep"): 71.96, ("4", "mosa"): 91.14}


def test_all_ten_tables_and_those_of_the_appendix_are_there():
    assert set(table_numbers()) == {
        *map(str, range(1, 11)),
        "13",
        "14",
        "15",
        *map("ours-{}".format, range(1, 8)),
        "figure-3",
    }


def test_the_sweep_gives_every_method_every_bottleneck_at_its_methods_learning_rate():
    table = read_table("figure-3")
    values = (4, 8, 16, 32, 64, 128, 256)
    methods = ("adaptformer", "mosa", "mosa-sample", "dropout", "dropout-two-pass")
    assert [row.key for row in table.rows] == [f"{method}/{value}" for method in methods for value in values]
    assert table.claims == tuple((f"mosa/{value}", f"adaptformer/{value}") for value in values)
    assert ("mosa/8", "dropout/8") in table.added
    assert len(table.added) == 3 * len(values)
    assert (table.name, read_table("9").name) == ("Figure 3", "Table 9")
    for row in table.rows:
        settings = cell_settings(table, row, table.tasks[0], candidates(table, row)[0], 0, Changes(), tuning=False)
        assert settings.adapter.bottleneck == row.swept
        at = tuned_row(row)
        settings = cell_settings(table, at, table.tasks[0], candidates(table, at)[0], 0, Changes(), tuning=True)
        assert settings.adapter.bottleneck == 64
    shared = [
        {cell.identity for cell in Grid(read_table(number), Changes()).final_cells(*_of(number, key))}
        for number, key in (("9", "mosa"), ("figure-3", "mosa/64"))
    ]
    assert shared[0] == shared[1]


def _of(number: str, key: str) -> tuple[Row, Task, Choice]:
    """A row on the digits with 20 labels a class, with the first candidate."""
    table = read_table(number)
    (row,) = (row for row in table.rows if row.key == key)
    (task,) = (task for task in table.tasks if task.name == "digits, 20 labels a class")
    return row, task, Choice(candidates(table, tuned_row(row))[0], 0.0, ())


@pytest.mark.parametrize("number", ["1", "2", "3", "4", "5", "13", "14"])
def test_printed_means_are_means_of_printed_columns(number: str):
    for row in read_table(number, "/data").rows:
        columns = [value for name, value in row.paper.items() if name != "mean"]
        if columns:
            expected = MISPRINTS.get((number, row.variant), row.paper["mean"])
            assert sum(columns) / len(columns) == pytest.approx(expected, abs=0.03), row.variant


def test_table_15_prints_means_over_tasks_and_groups():
    groups = {"natural": 7, "specialized": 4, "structured": 8}
    for row in read_table("15", "/data").rows:
        if row.paper:
            tasks = [value for name, value in row.paper.items() if name not in {*groups, "mean"}]
            assert len(tasks) == 19
            assert sum(tasks) / 19 == pytest.approx(row.paper["mean"], abs=0.02)
            assert sum(tasks[7:11]) / 4 == pytest.approx(row.paper["specialized"], abs=0.03)


def test_real_tasks_are_the_papers_data_sets():
    assert [task.data for task in read_table("1", "/data").tasks] == [f"fgvc:/data/{name}" for name in names_of(FGVC)]
    vtab = read_table("2", "/data").tasks
    assert [task.data for task in vtab] == [f"vtab1000:/data/{name}" for name in names_of(VTAB)]
    assert [task.tuning_data for task in vtab] == [f"vtab:/data/{name}" for name in names_of(VTAB)]
    gicd = read_table("3", "/d").tasks  # the held-out images choose, and are trained on in the end
    assert [task.data for task in gicd] == [f"torchvision-all:{name}" for name in names_of(GICD)]
    assert [task.tuning_data for task in gicd] == [f"torchvision:{name}" for name in names_of(GICD)]


def test_folders_may_have_any_name_in_use(tmp_path: Path):
    for name in ("cifar100", "flowers102", "svhn"):
        (tmp_path / name).mkdir()
    tasks = {task.name: task for task in read_table("2", str(tmp_path)).tasks}
    assert tasks["CIFAR-100"].data == f"vtab1000:{tmp_path}/cifar100"
    assert tasks["Flowers102"].tuning_data == f"vtab:{tmp_path}/flowers102"
    assert tasks["SVHN"].data == f"vtab1000:{tmp_path}/svhn"
    assert tasks["DTD"].data == f"vtab1000:{tmp_path}/dtd"
    (tmp_path / "cub").mkdir()
    assert read_table("1", str(tmp_path)).tasks[0].data == f"fgvc:{tmp_path}/cub"


def test_a_run_is_the_same_however_its_folder_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    spelled = (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/x/..", ".", "")
    cells = []
    for root in spelled:
        table = read_table("2", root)
        changes = Changes(data_root=root, checkpoint=f"{root or '.'}/B.npz")
        cells.append(Grid(table, changes).tuning_cells(table.rows[0], table.tasks[0])[0][0])
    assert {cell.settings.data for cell in cells} == {f"vtab:{tmp_path}/cifar"}
    assert len({cell.identity for cell in cells}) == 1


def test_weight_decay_can_be_chosen_like_a_learning_rate():
    table = read_table("9")
    more = dataclasses.replace(table, tune_more={"weight_decay": [0.01, 0.0]})
    row = by_variant("9")["mosa-n2"]
    assert len(candidates(more, row)) == 2 * len(candidates(table, row))
    cells = [group[0] for group in Grid(more, Changes(), 1, 1).tuning_cells(row, table.tasks[0])]
    assert {cell.settings.recipe.weight_decay for cell in cells} == {0.01, 0.0}
    # 0.01 is the recipe's own: those runs are the ones of the table as it is
    plain = {group[0].identity for group in Grid(table, Changes(), 1, 1).tuning_cells(row, table.tasks[0])}
    assert plain < {cell.identity for cell in cells}


@pytest.mark.parametrize("number", table_numbers())
def test_every_claim_and_control_is_about_a_row(number: str):
    table = read_table(number)
    keys = {row.key for row in table.rows}
    assert table.claims or number in OWN_CONTROLS
    assert {key for claim in table.claims for key in claim} <= keys
    assert not table.unavailable
    controls = dict.fromkeys(row.variant for row in table.rows if row.origin == "control")
    assert tuple(controls) == OWN_CONTROLS.get(number, ("dropout", "dropout-two-pass"))
    assert {key for pair in table.added for key in pair} <= keys
    assert all(row.origin == "paper" for row in table.rows if row.paper)
    names = {task.name for task in table.tasks}
    assert all(task.tuned_on in names or number == "3" for task in table.tasks)


@pytest.mark.parametrize("number", table_numbers())
def test_every_cell_has_valid_settings(number: str):
    table = read_table(number)
    for row in table.rows:
        for task in table.tasks:
            for numbers in candidates(table, tuned_row(row)):
                settings = cell_settings(table, row, task, numbers, 3, Changes(), tuning=False)
                assert settings.recipe.lr == numbers["lr"]
                own = read_spec()["variants"][row.variant].get("recipe", {})
                assert settings.recipe.dropout == {**own, **numbers}.get("dropout", 0)
                assert (settings.data_seed, settings.recipe.seed) == (3, 1003)
                assert settings.recipe.select == "last"


def by_variant(number: str, root: str | None = None) -> dict[str, Row]:
    return {row.variant: row for row in read_table(number, root).rows}


def test_the_ablations_are_what_they_say():
    def settings(number: str, variant: str):
        table = read_table(number)
        row = by_variant(number)[variant]
        return cell_settings(table, row, table.tasks[0], {"lr": 0.01}, 0, Changes(), tuning=False)

    assert settings("6", "mosa-both").adapter.sparse == "both"
    assert settings("6", "mosa").adapter.sparse == "up"
    assert settings("7", "mosa-plain").passes == 1
    assert settings("7", "mosa-consistency").recipe.regularisation == "consistency"
    assert settings("7", "mosa").recipe.regularisation == "consistency+alignment"
    assert [settings("8", name).recipe.align for name in ("mosa", "mosa-deep", "mosa-all")] == [
        "shallow",
        "deep",
        "all",
    ]
    assert [settings("9", f"mosa-n{n}").adapter.num_experts for n in (2, 3, 5, 8)] == [2, 3, 5, 8]
    assert settings("5", "mosl").adapter.style == "lora"
    assert settings("5", "dropout").adapter.style == "lora"
    assert settings("1", "mosa").recipe.expert_per == "batch"
    assert settings("1", "dropout-two-pass").passes == 2
    assert tuned_row(by_variant("9")["mosa-n8"]).variant == "mosa"


def test_the_scale_of_an_adapter_can_be_chosen_like_a_learning_rate():
    table = read_table("ours-3")
    row = by_variant("ours-3")["dropout-own-scale"]
    tried = candidates(table, row)
    assert len(tried) == 3 * 4 * 2
    assert {numbers["scale"] for numbers in tried} == {0.1, 0.4, 1.0, 2.5}
    for numbers in tried:
        settings = cell_settings(table, row, table.tasks[0], numbers, 0, Changes(), tuning=True)
        assert (settings.adapter.scale, settings.recipe.dropout) == (numbers["scale"], numbers["dropout"])
    # A scale that is the style's own makes the run that leaves it to the style: tables share it.
    plain = read_table("9")
    said, left = (
        Cell("", cell_settings(each, one, each.tasks[0], numbers, 0, Changes(), tuning=True), test=False).identity
        for each, one, numbers in (
            (table, by_variant("ours-3")["adaptformer-own-scale"], {"lr": 0.03, "scale": 0.1}),
            (plain, by_variant("9")["adaptformer"], {"lr": 0.03}),
        )
    )
    assert said == left


def test_styles_of_full_scale_choose_from_lower_learning_rates():
    def rates(number: str, variant: str) -> list[float]:
        return sorted({each["lr"] for each in candidates(read_table(number), by_variant(number)[variant])})

    assert rates("1", "mosa") == rates("14", "pfeiffer") == [0.01, 0.03]
    for variant in ("lora", "mosl", "dropout"):
        assert rates("5", variant) == [0.003, 0.01]
    for variant in ("mosa-houlsby", "dropout-two-pass-houlsby"):
        assert rates("14", variant) == [0.003, 0.01, 0.03]


def test_what_a_table_says_of_offline_tasks_is_not_for_real_data():
    offline, real = read_table("4"), read_table("4", "/data")
    assert (offline.model, real.model) == ("vit_offline_deep_patch8_32", "vit_large_patch16_224.orig_in21k")
    assert candidates(offline, by_variant("4")["dropout"]) == [
        {"lr": 0.01, "dropout": 0.3},
        {"lr": 0.03, "dropout": 0.3},
    ]
    row = by_variant("4", "/data")["dropout"]
    assert {numbers["dropout"] for numbers in candidates(real, row)} == {0.3, 0.6}
    assert len(real.tasks) == 5


def test_a_table_chooses_among_what_another_has_left():
    table = read_table("ours-4")
    assert candidates(table, by_variant("ours-4")["mosa-own-scale"]) == [
        {"lr": 0.01, "scale": 1.0},
        {"lr": 0.01, "scale": 2.5},
    ]
    dropped = candidates(table, by_variant("ours-4")["dropout-own-scale"])
    assert {each["dropout"] for each in dropped} == {0.1, 0.3}
    assert len(dropped) == 4
    last, rows = read_table("ours-7"), by_variant("ours-7")
    assert {each["dropout"] for each in candidates(last, rows["dropout-own-scale"])} == {0.2, 0.5}
    rising = candidates(last, rows["dropout-rising-two-pass-own-scale"])
    assert {(each["scale"], each["dropout"]) for each in rising} == {(1.0, "0:0.3"), (1.0, "0:0.6")}
    assert len(candidates(read_table("ours-3"), by_variant("ours-3")["mosa-own-scale"])) == 12


def test_the_real_scale_is_the_papers_recipe():
    table = read_table("4", "/data")
    row = by_variant("4", "/data")["mosa"]
    assert [numbers["base_lr"] for numbers in candidates(table, row)] == [0.01, 0.005, 0.001, 0.0005, 0.0001]
    settings = cell_settings(table, row, table.tasks[0], {"base_lr": 0.01}, 0, Changes(), tuning=False)
    assert settings.model == "vit_large_patch16_224.orig_in21k"
    assert settings.recipe == make_recipe(
        "paper", settings.model, base_lr=0.01, select="last", seed=1000, expert_per="batch"
    )
    assert math.isclose(settings.recipe.lr, 0.01 * 64 / 256)


def test_seeds_that_choose_are_not_those_that_are_reported():
    grid = Grid(read_table("9"), Changes())
    row, task = grid.table.rows[0], grid.table.tasks[0]
    assert all(cell.settings.data_seed >= FIRST_TUNING_SEED for group in grid.tuning_cells(row, task) for cell in group)
    assert len({cell.settings.data_seed for cell in grid.tuning_cells(row, task)[0]}) == 4
    with pytest.raises(ValueError, match="seeds: expected 1 to 100, got 101"):
        Grid(grid.table, Changes(), seeds=101)
    with pytest.raises(ValueError, match="tuning_seeds: expected at least 1, got 0"):
        Grid(grid.table, Changes(), tuning_seeds=0)


def test_one_recipe_is_the_best_of_all_tasks_by_their_mean(tmp_path: Path):
    # learning rate: validation accuracy on the digits and on counting; each rate is the best of one column or the mean
    measured = {0.003: (70.0, 50.0), 0.01: (68.0, 66.0), 0.03: (40.0, 68.0)}
    table = read_table("ours-3")
    row = next(row for row in table.rows if row.variant == "adaptformer-own-scale")
    table = dataclasses.replace(table, rows=(row,), tune={"scale": [1.0]})
    shared = dataclasses.replace(table, one_recipe=True)
    for cell in Grid(table, Changes()).all_tuning_cells():
        accuracy = measured[cell.settings.recipe.lr]["count" in cell.settings.data]
        result = {"mechanisms": cell.mechanisms, "measured": {"plain": {"accuracy": accuracy}}}
        write_json(tmp_path / f"a-{cell.identity}.json", result)
    each, one = (
        {task.name: grid.choose(row, task, tmp_path) for task in table.tasks}
        for grid in (Grid(table, Changes()), Grid(shared, Changes()))
    )
    assert [choice.numbers["lr"] for choice in each.values()] == [0.003, 0.003, 0.03]  # few digits take over
    assert [choice.validation for choice in each.values()] == [70.0, 70.0, 68.0]
    assert {(choice.numbers["lr"], choice.validation) for choice in one.values()} == {(0.01, 67.0)}
    cells = [{cell.identity for cell in Grid(some, Changes()).all_tuning_cells()} for some in (table, shared)]
    assert cells[0] == cells[1]


def test_a_row_whose_method_is_missing_is_named(monkeypatch: pytest.MonkeyPatch):
    row = by_variant("1")["bitfit"]
    assert why_not(row) is None
    monkeypatch.delitem(METHODS, "bitfit")
    assert why_not(row) == "there is no method 'bitfit'"
    assert read_table("1").unavailable == {"BitFit": "there is no method 'bitfit'"}


def test_bad_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"table: expected one of 1, 2, .*, figure-3 or all, got '11'"):
        read_table("11")
    assert read_spec() is read_spec()


def test_rows_that_cannot_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch):
    raw = read_spec()["tables"]["1"]
    again = {"variant": "adaptformer", "origin": "control", "adapter": {"style": "houlsby"}}
    monkeypatch.setitem(raw, "controls", [*raw.get("controls", []), again])
    with pytest.raises(ValueError, match=r"table 1: results are kept by variant, .* more than one row is adaptformer"):
        read_table("1")
