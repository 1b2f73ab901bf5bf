"""What a reader of a table has to know of it: what was chosen for its rows, and what its counts count."""

from __future__ import annotations

from mosa_kernels.train.table_grid import Grid
from mosa_kernels.train.table_spec import Row, Table, candidates, read_spec, style_of, tuned_row

NAMES = {
    "lr": "learning rate",
    "base_lr": "learning rate at a batch of 256",
    "scale": "scale of the adapter",
    "weight_decay": "weight decay",
}


def what_was_chosen(grid: Grid) -> str:
    """The sentence that says which numbers validation chose, for which rows, and who takes over whose."""
    table = grid.table
    chosen: dict[str, list[Row]] = {}
    for row in table.rows:
        tried = candidates(table, tuned_row(row))
        for name in tried[0]:
            if len({numbers[name] for numbers in tried}) > 1:
                chosen.setdefault(name, []).append(row)
    parts = []
    for name, rows in chosen.items():
        whose = "all rows" if len(rows) == len(table.rows) else _titles(rows)
        parts.append(f"{NAMES.get(name, name)} ({whose})")
    if not parts:
        return "Nothing was chosen: each row has one value of everything."
    over = "all tasks, each row once for all of them, and " if table.one_recipe else ""
    text = f"Chosen by mean validation accuracy over {over}{grid.tuning_seeds} other seed(s): {'; '.join(parts)}."
    borrowed: dict[str, list[Row]] = {}
    for row in table.rows:
        source = tuned_row(row).variant
        if source != row.variant:
            borrowed.setdefault(source, []).append(row)
    for source, rows in borrowed.items():
        text += f" What was chosen for {read_spec()['variants'][source]['title']} is taken over by: {_titles(rows)}."
    if table.one_recipe:
        choosing = {task.name for task in grid.tuning_tasks(table.tasks[0])}
        return text + "".join(f" “{task.name}” had no say." for task in table.tasks if task.name not in choosing)
    for task in table.tasks:
        (other,) = grid.tuning_tasks(task)
        if other.name != task.name:
            text += f" What was chosen on “{other.name}” is taken over on “{task.name}”."
    return text


def _titles(rows: list[Row]) -> str:
    """Of a sweep, a method once."""
    titles = (row.title if row.swept is None else row.title.rpartition(",")[0] for row in rows)
    return "; ".join(dict.fromkeys(titles))


def notes_on_parameters(table: Table) -> str:
    """What the column of parameters counts, and where the paper counts otherwise."""
    text = "params (M): what is trained, in millions, without the head and without further expert biases."
    printed = [row for row in table.rows if row.paper_params is not None]
    methods = {row.variant: read_spec()["variants"][row.variant]["method"] for row in table.rows}
    adapted = [row for row in printed if methods[row.variant] in ("adaptformer", "sparseadapter", "mosa")]
    if any(style_of(row) == "adaptformer" for row in adapted):
        text += (
            " Adapters beside the feed-forward network have a LayerNorm, which the paper's counts leave out: "
            "bottleneck 64 in ViT-B/16 has 1.21 here and 1.19 there."
        )
    if any(methods[row.variant] == "sparseadapter" for row in adapted):
        text += " Pruned adapters keep all their biases (and the LayerNorm); the paper's counts are a quarter of all."
    if any(methods[row.variant].startswith("vpt") for row in table.rows):
        text += (
            " VPT has 10 prompts on every task here; in the paper, which follows VPT, their number is chosen by task."
        )
    return text
