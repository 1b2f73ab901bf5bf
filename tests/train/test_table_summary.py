"""What a table says, from numbers whose means, spreads and tests are known."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest
from PIL import Image

from mosa_kernels.train.table_figure import draw_by_task, draw_table
from mosa_kernels.train.table_grid import Choice, Grid, Measured
from mosa_kernels.train.table_report import rows_of_table, table_csv, table_markdown, table_record
from mosa_kernels.train.table_spec import Changes, Table, read_table
from mosa_kernels.train.table_summary import Summary, differences_of, summarise_table

CHOICE = Choice({"lr": 0.03}, 70.0, ())


def measured(table: Table, accuracy: dict[tuple[str, str], tuple[float | None, ...]]) -> dict[str, dict[str, Measured]]:
    """Some cells as given, all others at 50."""
    return {
        row.key: {
            task.name: Measured(accuracy.get((row.key, task.name), (50.0, 50.0, 50.0)), CHOICE, 1_190_000, 2.0)
            for task in table.tasks
        }
        for row in table.rows
    }


def table_2() -> Table:
    """Two natural tasks and one structured, so that both means differ."""
    table = read_table("2")
    wanted = ("digits, 10 labels a class", "digits, 20 labels a class", "count")
    return dataclasses.replace(table, tasks=tuple(task for task in table.tasks if task.name in wanted))


def row_of(summaries: list[Summary], key: str) -> Summary:
    return next(summary for summary in summaries if summary.row.key == key)


def test_both_kinds_of_mean_seed_by_seed():
    table = table_2()
    first, second, third = (task.name for task in table.tasks)
    given = {("mosa", first): (60.0, 62.0), ("mosa", second): (70.0, 72.0), ("mosa", third): (80.0, 88.0)}
    cells = measured(table, {})
    for (key, name), values in given.items():
        cells[key][name] = dataclasses.replace(cells[key][name], accuracies=values)
    found = row_of(summarise_table(table, cells), "mosa").values
    assert list(found) == [first, second, third, "natural", "structured", "mean", "mean of groups"]
    assert found["natural"].by_seed == (65, 67)
    assert found["mean"].by_seed == (70, 74)
    assert found["mean of groups"].by_seed == (72.5, 77.5)
    assert found["mean"].mean == 72
    assert found["mean"].spread == pytest.approx(math.sqrt(8))
    assert str(found["mean"]) == "72.00 ± 2.83"


def test_the_papers_mean_stands_beside_the_mean_that_it_is():
    summaries = summarise_table(table_2(), measured(table_2(), {}))
    assert row_of(summaries, "mosa").paper["mean of groups"] == 71.39
    assert "mean" not in row_of(summaries, "mosa").paper
    assert row_of(summaries, "vpt-deep").paper["mean"] == 69.42
    assert "mean of groups" not in row_of(summaries, "vpt-deep").paper


def test_a_run_that_failed_is_counted_and_left_out(tmp_path: Path):
    table = read_table("9")
    name = table.tasks[0].name
    summaries = summarise_table(table, measured(table, {("mosa", name): (60.0, None, 64.0)}))
    found = row_of(summaries, "mosa").values
    assert found[name].failed == 1
    assert str(found[name]) == "62.00 ± 2.83 (1 failed)"
    assert len(found["mean"].by_seed) == 2
    nothing = summarise_table(table, measured(table, {("mosa", name): (None, None, None)}))
    assert str(row_of(nothing, "mosa").values[name]) == "failed"
    assert math.isnan(row_of(nothing, "mosa").values["mean"].mean)
    assert sum(cell.startswith("**") for row in rows_of_table(nothing) for cell in row) == len(table.rows) - 1
    against = differences_of(table, measured(table, {("mosa", name): (None, None, None)}))
    assert "runs failed" in str(next(d for d in against if d.better == "4"))
    draw_table(nothing, "a table with a hole", tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_differences_are_paired_and_carry_the_papers():
    table = read_table("9")
    cells = measured(table, {})
    for number, task in enumerate(table.tasks):
        values = (52.0 + number, 53.0 + number, 51.5 + number)
        cells["mosa"][task.name] = dataclasses.replace(cells["mosa"][task.name], accuracies=values)
    found = {(d.better, d.worse): d for d in differences_of(table, cells)}
    against = found["4", "1 (AdaptFormer)"]
    assert against.claimed
    assert against.points == pytest.approx((3.0, 4.0, 2.5))
    assert against.paper == pytest.approx(89.43 - 88.58)
    assert against.pairs == 9
    assert against.verdict == "higher"
    assert found["4", "8"].mean == pytest.approx(19 / 6)
    assert "paper +0.86" in str(found["4", "8"])
    assert found["2", "1 (AdaptFormer)"].verdict == "undecided"
    extra = [d for d in found.values() if not d.claimed]
    assert {d.better for d in extra} == {"2"}
    assert len(extra) == 3


def test_the_papers_differences_are_of_one_kind_of_mean():
    def paper(number: str, better: str, worse: str) -> float | None:
        table = read_table(number, "/data")
        titles = {row.key: row.title for row in table.rows}
        found = differences_of(table, measured(table, {}))
        return next(d.paper for d in found if (d.better, d.worse) == (titles[better], titles[worse]))

    # Table 2 prints MoSA's mean over groups beside VPT's over the 19 tasks; Table 15 has all tasks.
    over_tasks = (7 * (79.86 - 78.48) + 4 * (84.03 - 82.43) + 8 * (50.28 - 54.98)) / 19
    assert paper("2", "mosa", "vpt-deep") == pytest.approx(over_tasks)
    assert over_tasks == pytest.approx(68.25 - 69.42, abs=0.05)
    assert paper("2", "mosa", "adaptformer") == pytest.approx(68.25 - 67.16, abs=0.05)
    assert paper("15", "mosa", "adaptformer") == pytest.approx(68.25 - 67.16, abs=0.02)
    # Table 4 misprints the mean of MoSA's columns.
    assert paper("4", "mosa", "full") == pytest.approx(91.14 - 90.16)
    assert paper("6", "mosa", "adaptformer") == pytest.approx(89.9 - 88.58)
    assert paper("1", "mosa", "mosa-sample") is None


def test_the_page_says_what_was_chosen_and_what_is_counted():
    def page(number: str, **changes: object) -> str:
        table = dataclasses.replace(read_table(number), **changes)  # type: ignore[arg-type]
        cells = measured(table, {})
        return table_markdown(
            Grid(table, Changes()), cells, summarise_table(table, cells), differences_of(table, cells), {}
        )

    assert (
        "over 4 other seed(s): learning rate (all rows); dropout (AdaptFormer + dropout; AdaptFormer + dropout, two "
        "passes + KL). What was chosen on “digits, 20 labels a class” is taken over on “digits, 10 labels a "
        "class”. Each"
    ) in page("1")
    assert "other seed(s): learning rate (all rows); scale of the adapter (all rows); dropout (Ada" in page("ours-3")
    assert "other seed(s): scale of the adapter (all rows); dropout (AdaptFormer + dropout; Ada" in page("ours-4")
    one = page("ours-3", one_recipe=True)
    assert "accuracy over all tasks, each row once for all of them, and 4 other seed(s): learning rate (all" in one
    assert ". “digits, 10 labels a class” had no say. Each" in one
    assert "had no say" not in page("ours-6")
    assert "weight decay (all rows)" in page("9", tune_more={"weight_decay": [0.01, 0.0]})
    assert "What was chosen for MoSA (paper: an expert per batch) is taken over by: 2; 3; 5; 8." in page("9")
    assert "Nothing was chosen" in page("9", tune={"lr": [0.01], "dropout": [0.3]})
    sweep = page("figure-3")
    assert "dropout (AdaptFormer + dropout; AdaptFormer + dropout, two passes + KL)." in sweep
    assert "has 1.21 here and 1.19 there. Pruned adapters keep all" in page("1")
    assert "VPT has 10 prompts" in page("1")
    assert "1.19 M: 2 x 64 x 768 weights" in page("1")
    assert "LayerNorm, which" not in page("5")
    assert "VPT has" not in page("14")
    assert "computed from its columns" in page("2")


def test_differences_by_task_are_drawn_and_told(tmp_path: Path):
    table = read_table("ours-4")
    cells = measured(table, {("mosa-own-scale", "5 labels a class"): (52.0, 53.0, 51.5)})
    found = differences_of(table, cells)
    assert len(found) == len(table.added) * len(table.tasks)
    few, *_, clean = [each for each in found if each.better == cells_title(table, "mosa-own-scale")][: len(table.tasks)]
    assert few.points == pytest.approx((2.0, 3.0, 1.5))
    assert (few.pairs, few.task) == (3, "5 labels a class")
    assert clean.points == (0, 0, 0)
    assert "AdaptFormer on 5 labels a class: +2.17" in str(few)
    draw_by_task(found, "a map", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_a_table_without_figures_of_the_paper_is_drawn_task_by_task(tmp_path: Path):
    def drawn(number: str, **changes: object) -> tuple[int, int]:
        table = dataclasses.replace(read_table(number), **changes)  # type: ignore[arg-type]
        draw_table(summarise_table(table, measured(table, {})), "a table", tmp_path / "table.png")
        with Image.open(tmp_path / "table.png") as picture:
            return picture.size

    ours = read_table("ours-6")
    (wide, high), (beside, _) = drawn("ours-3"), drawn("1")
    assert wide / beside == pytest.approx(20 / 12, rel=0.01)  # three tasks and their mean; one mean beside the paper's
    assert drawn("ours-6")[0] / beside == pytest.approx(8 / 12, rel=0.01)  # the mean of six tasks alone
    assert drawn("ours-6", tasks=ours.tasks[:1])[0] / beside == pytest.approx(8 / 12, rel=0.01)
    assert high > 300


def cells_title(table: Table, key: str) -> str:
    return next(row.title for row in table.rows if row.key == key)


def test_a_column_of_the_papers_counts_only_where_it_prints_one():
    for number, printed in (("1", True), ("ours-3", False)):
        table = read_table(number)
        head, *body = rows_of_table(summarise_table(table, measured(table, {})))
        assert (head[-1] == "paper") == printed
        assert head.count("params (M)") == 1
        assert all(len(row) == len(head) for row in body)


def test_markdown_csv_and_json_hold_the_same_numbers():
    table = table_2()
    cells = measured(table, {("mosa", "count"): (80.0, 81.0, 82.0)})
    summaries, differences = summarise_table(table, cells), differences_of(table, cells)
    grid = Grid(table, Changes())
    text = table_markdown(grid, cells, summaries, differences, {"command": "mosa-kernels table 2", "quick": True})
    assert "81.00 ± 1.00" in text
    assert "**QUICK" in text
    assert "mosa-kernels table 2" in text
    assert "(control)" in text
    head, *body = rows_of_table(summaries)
    assert all(len(row) == len(head) for row in body)
    assert sum(cell.startswith("**") for row in body for cell in row) == 1
    lines = list(csv.DictReader(io.StringIO(table_csv(summaries))))
    found = next(line for line in lines if (line["row"], line["column"]) == ("mosa", "count"))
    assert (float(found["mean"]), float(found["spread"]), found["seeds"]) == (81, 1, "3")
    natural = next(line for line in lines if (line["row"], line["column"]) == ("mosa", "natural"))
    assert natural["paper"] == "79.86"
    record = table_record(grid, cells, differences, {"command": "x"})
    assert record["rows"]["mosa"]["tasks"]["count"]["accuracies"] == (80.0, 81.0, 82.0)
    assert record["differences"][0]["verdict"] in ("higher", "lower", "undecided")
