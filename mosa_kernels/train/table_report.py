"""A table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mosa_kernels.train.comparison_report import markdown_table
from mosa_kernels.train.methods import number_words
from mosa_kernels.train.table_grid import Grid, Measured, recipe_of
from mosa_kernels.train.table_notes import notes_on_parameters, what_was_chosen
from mosa_kernels.train.table_spec import Table
from mosa_kernels.train.table_summary import MEAN, Difference, Summary

LIKE_WITH_LIKE = (
    "Differences of means over tasks; so are the paper's, computed from its columns where it prints them, as its last "
    "column is not always that mean."
)


def columns_of(summaries: Sequence[Summary]) -> list[str]:
    """The columns of ours, in order."""
    return list(summaries[0].values)


def with_paper(summaries: Sequence[Summary]) -> set[str]:
    """The columns that the paper prints, too."""
    return {name for summary in summaries for name in summary.paper} & set(columns_of(summaries))


def rows_of_table(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """A heading and a row a method; the paper's figure stands to the right of ours, the best mean is bold."""
    printed = with_paper(summaries)
    head = ["method"]
    for column in columns_of(summaries):
        head += [column, "paper"] if column in printed else [column]
    counted = any(summary.row.paper_params is not None for summary in summaries)
    rows = [(*head, "params (M)", *(["paper"] if counted else []))]
    best = max((s.values[MEAN].mean for s in summaries if s.values[MEAN].by_seed), default=None)
    for summary in summaries:
        cells = [summary.row.title + ("" if summary.row.origin == "paper" else f" ({summary.row.origin})")]
        for column, value in summary.values.items():
            bold = column == MEAN and value.mean == best
            cells.append(f"**{value}**" if bold else str(value))
            if column in printed:
                cells.append(f"{summary.paper[column]:.2f}" if column in summary.paper else "-")
        cells.append(f"{summary.parameters:.3f}")
        if counted:
            paper = summary.row.paper_params
            cells.append("-" if paper is None else f"{paper:.2f}")
        rows.append(tuple(cells))
    return rows


def rows_of_choices(table: Table, measured: Mapping[str, Mapping[str, Measured]]) -> list[tuple[str, ...]]:
    """What validation chose; an asterisk marks the end of its grid."""
    rows: list[tuple[str, ...]] = [("method", *(task.name for task in table.tasks), "seconds a run")]
    for row in table.rows:
        found = measured[row.key]
        cells = []
        for task in table.tasks:
            choice = found[task.name].choice
            parts = (
                f"{number_words(name, value)}{'*' * (name in choice.at_edge)}" for name, value in choice.numbers.items()
            )
            cells.append(", ".join(parts))
        seconds = sum(one.seconds for one in found.values()) / len(found)
        rows.append((row.title, *cells, f"{seconds:.1f}"))
    return rows


def table_markdown(
    grid: Grid,
    measured: Mapping[str, Mapping[str, Measured]],
    summaries: Sequence[Summary],
    differences: Sequence[Difference],
    facts: Mapping[str, Any],
) -> str:
    """The whole page of a table.

    Args:
        grid, measured: the runs.
        summaries, differences: what they say.
        facts: "command", "machine", "versions", "quick" and whatever else belongs to the record.
    """
    table = grid.table
    where = {
        "real": "the paper's data sets",
        "offline": "offline tasks in place of the paper's data sets: the paper's figures are for orientation only",
    }[table.scale]
    given = f"bottleneck {table.bottleneck}" if table.sweep is None else f"{table.sweep} as given"
    parts = [f"# {table.name}: {table.title}"]
    if facts.get("quick"):
        parts.append("**QUICK: a few steps, to see that everything works. These are not the real figures.**")
    parts.append(
        f"On {where}. Test accuracy in percent, mean ± sample standard deviation over {grid.seeds} seed(s); backbone "
        f"{table.model}, {given}. {what_was_chosen(grid)} Each run tests once, after its last epoch."
    )
    if table.note:
        parts.append(table.note)
    parts.append(markdown_table(rows_of_table(summaries)))
    parts.append(notes_on_parameters(table))
    if table.unavailable:
        parts.append("Not run: " + "; ".join(f"{title} ({why})" for title, why in table.unavailable.items()) + ".")
    for title, claimed in (
        ("Differences that the paper claims", True),
        ("Other differences", False),
    ):
        lines = [f"- {difference}" for difference in differences if difference.claimed == claimed]
        if lines:
            parts.append(f"## {title}")
            if any(difference.paper is not None for difference in differences if difference.claimed == claimed):
                parts.append(LIKE_WITH_LIKE)
            parts.append("\n".join(lines))
    choices = markdown_table(rows_of_choices(table, measured))
    parts.append(f"## Chosen on validation images (* at the end of its grid)\n\n{choices}")
    recipe = ", ".join(f"{key} {value}" for key, value in recipe_of(grid).as_dict().items() if key != "seed")
    parts.append(f"## How it was made\n\nRecipe, before each row's and task's own changes: {recipe}.")
    parts.append("\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items() if key != "quick"))
    return "\n\n".join(parts) + "\n"


def table_csv(summaries: Sequence[Summary]) -> str:
    """One line a row and column: mean, spread, seeds, and the paper's figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("row", "title", "origin", "column", "mean", "spread", "seeds", "paper", "parameters_millions"))
    for summary in summaries:
        for column, value in summary.values.items():
            row = summary.row
            writer.writerow(
                (
                    row.key,
                    row.title,
                    row.origin,
                    column,
                    f"{value.mean:.4f}",
                    f"{value.spread:.4f}",
                    len(value.by_seed),
                    summary.paper.get(column, ""),
                    f"{summary.parameters:.6f}",
                )
            )
    return text.getvalue()


def table_record(
    grid: Grid,
    measured: Mapping[str, Mapping[str, Measured]],
    differences: Sequence[Difference],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Every number of the table, by row, task and seed, ready for JSON."""
    table = grid.table
    return {
        "table": table.number,
        "title": table.title,
        "scale": table.scale,
        "model": table.model,
        "seeds": grid.seeds,
        "tuning_seeds": grid.tuning_seeds,
        "rows": {
            row.key: {
                "title": row.title,
                "origin": row.origin,
                "paper": dict(row.paper),
                "tasks": {name: asdict(found) for name, found in measured[row.key].items()},
            }
            for row in table.rows
        },
        "differences": [
            {**asdict(difference), "mean": difference.mean, "verdict": difference.verdict} for difference in differences
        ],
        "recipe": recipe_of(grid).as_dict(),
        **facts,
    }
