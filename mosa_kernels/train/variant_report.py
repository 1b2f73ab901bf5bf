"""A comparison of variants that no table of the paper has: table, picture and record."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mosa_kernels._machine import machine
from mosa_kernels.train.comparison_report import markdown_table
from mosa_kernels.train.folder import versions, write_json, write_text
from mosa_kernels.train.table_figure import draw_table
from mosa_kernels.train.table_grid import Measured
from mosa_kernels.train.table_report import rows_of_table
from mosa_kernels.train.table_spec import Row, Table
from mosa_kernels.train.table_summary import differences_of, summarise_table


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of such a comparison.

    Attributes:
        key, title: for files and for readers.
        against: keys of what it is held against; those that are not compared are left out.
        origin: "ours" or "control".
    """

    key: str
    title: str
    against: Sequence[str] = ()
    origin: str = "ours"


def command_of(script: str, main: Callable[..., None], given: Mapping[str, Any]) -> str:
    """The command that repeats a comparison: with the options that decide what comes out and are not the usual ones.

    Args:
        script: its file.
        main: its function, whose defaults are usual.
        given: the arguments of this call.
    """
    usual = inspect.signature(main).parameters
    words = ["python", script, "OUTPUT"]
    for name, value in given.items():
        if name not in ("output", "workers") and value != usual[name].default:
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]  # True: a flag
    return shlex.join(words)


def write_variants(
    stem: Path,
    title: str,
    table: Table,
    variants: Sequence[Variant],
    measured: Mapping[str, Mapping[str, Measured]],
    *,
    note: str,
    how: str,
    record: Mapping[str, Any],
) -> str:
    """Writes `stem`.md, .json and .png, each complete or not at all; returns the Markdown.

    Args:
        stem: of the three files.
        title: of the comparison.
        table: whose tasks were run; its rows, claims and comparisons do not matter.
        variants: the rows, in order.
        measured: by the key of a variant, then by task.
        note: what has to be known to read the table.
        how: what made it.
        record: what the JSON file holds beside figures, machine and versions.
    """
    rows = tuple(
        Row(
            variant=variant.key,
            title=variant.title,
            adapter={},
            mechanism=None,
            paper={},
            paper_params=None,
            origin=variant.origin,
        )
        for variant in variants
    )
    pairs = [(variant.key, other) for variant in variants for other in variant.against]
    shown = dataclasses.replace(table, rows=rows, claims=(), added=tuple(dict.fromkeys(pairs)))
    summaries, differences = summarise_table(shown, measured), differences_of(shown, measured)
    parts = [
        f"# {title}",
        note,
        markdown_table(rows_of_table(summaries)),
        "Seed by seed:",
        "\n".join(f"- {each}" for each in differences),
        f"{how}, {machine()}.",
    ]
    markdown = "\n\n".join(parts) + "\n"
    write_text(stem.with_suffix(".md"), markdown)
    write_json(
        stem.with_suffix(".json"),
        {
            "title": title,
            **record,
            "measured": {
                key: {name: each.accuracies for name, each in found.items()} for key, found in measured.items()
            },
            "differences": [
                {**dataclasses.asdict(each), "mean": each.mean, "verdict": each.verdict} for each in differences
            ],
            "machine": machine(),
            "versions": versions(),
        },
    )
    draw_table(summaries, title, stem.with_suffix(".png"))
    return markdown
