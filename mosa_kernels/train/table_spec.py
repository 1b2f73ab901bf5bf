"""What stands behind each table of the paper, from `assets/tables.json`: rows, tasks, settings, printed figures."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mosa_kernels._files import expanded
from mosa_kernels.data.lists import find_folder
from mosa_kernels.data.published import FGVC, VTAB
from mosa_kernels.peft.styles import STYLES
from mosa_kernels.train.methods import DEFAULT_STYLE, METHODS, AdapterOptions, Numbers, split_numbers
from mosa_kernels.train.recipe import make_recipe
from mosa_kernels.train.settings import INITIAL_SEED, Settings

SPEC = Path(__file__).resolve().parent.parent / "assets" / "tables.json"
BENCHMARKS = {"fgvc": FGVC, "vtab": VTAB, "vtab1000": VTAB}  # by the kind of address


@dataclass(frozen=True)
class Task:
    """A data set as a column of a table.

    Attributes:
        name: as printed.
        data: as `open_data` takes it, of the final runs.
        tuning_data: the same for the runs that choose a learning rate.
        tuned_on: the task whose choice this one takes over.
        labels_per_class: of the offline tasks that take it.
        label_noise: share of the training labels that are wrong.
        recipe: overrides that the task needs.
        group: of VTAB-1k, or "".
    """

    name: str
    data: str
    tuning_data: str
    tuned_on: str
    labels_per_class: int = 20
    label_noise: float = 0.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: a variant, how the trained model is used, and the paper's figures.

    Attributes:
        variant: a key of the variants.
        title: as printed.
        adapter: overrides of the variant's adapter options.
        mechanism: of inference, as `evaluate` names it; None for the recipe's.
        paper: printed accuracies by column.
        paper_params: printed number of parameters, in millions.
        origin: "paper", or "control" or "ours" for what is added to the paper's rows.
        swept: the value of the swept option, of a row of a sweep.
        tune: values of its own to choose from, in place of the variant's and the table's.
    """

    variant: str
    title: str
    adapter: Mapping[str, Any]
    mechanism: str | None
    paper: Mapping[str, float]
    paper_params: float | None
    origin: str
    swept: int | None = None
    tune: Mapping[str, Sequence[float | str]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What claims call it."""
        part = self.mechanism if self.swept is None else self.swept
        return self.variant if part is None else f"{self.variant}/{part}"


@dataclass(frozen=True)
class Table:
    """A table of the paper, at one scale.

    Attributes:
        number, title, note: as printed.
        scale: "real" or "offline".
        model: timm's name of the backbone.
        bottleneck: r.
        tasks: the columns.
        rows: the paper's, then the controls.
        columns: the paper's columns.
        claims: pairs of row keys of which the paper says that the first is better.
        added: pairs of row keys of which the paper says nothing, such as its method and what is added to its rows.
        rates: learning rates to choose from by kind, in place of those of all tables.
        tune: fewer values for numbers that a row chooses, where another table has shown which.
        tune_more: values of further numbers of the recipe, from which every row chooses.
        by_task: differences are told task by task rather than of the mean over tasks.
        one_recipe: each row has one choice for all tasks, the best by the mean over them.
        sweep: the adapter option that runs through several values, or None.
        unavailable: titles of rows that this version cannot train, with the reason.
    """

    number: str
    title: str
    note: str
    scale: str
    model: str
    bottleneck: int
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    claims: tuple[tuple[str, str], ...]
    added: tuple[tuple[str, str], ...]
    unavailable: Mapping[str, str]
    rates: Mapping[str, list[float]] = field(default_factory=dict)
    tune: Mapping[str, Sequence[float | str]] = field(default_factory=dict)
    tune_more: Mapping[str, list[float]] = field(default_factory=dict)
    by_task: bool = False
    one_recipe: bool = False
    sweep: str | None = None

    @property
    def name(self) -> str:
        """As the paper calls it: "Table 9", "Figure 3"."""
        kind, _, number = self.number.rpartition("-")
        return f"{kind.capitalize() or 'Table'} {number}"


@functools.lru_cache(maxsize=1)
def read_spec() -> dict[str, Any]:
    """The whole file."""
    spec: dict[str, Any] = json.loads(SPEC.read_text())
    return spec


def table_numbers() -> tuple[str, ...]:
    """The tables that can be made."""
    return tuple(read_spec()["tables"])


def suite_of(number: str) -> str:
    """Which collection of data sets a table needs: "fgvc", "vtab" or "gicd".

    Raises:
        ValueError: no such table.
    """
    tables = read_spec()["tables"]
    if number not in tables:
        raise ValueError(f"table: expected one of {', '.join(tables)} or all, got {number!r}")
    suite: str = tables[number]["suite"]
    return suite


def whole_path(path: str | Path) -> str:
    """A path as it is spelled in addresses and settings, so that a run has one identity however it was given."""
    return str(expanded(path).resolve())


def read_table(number: str, root: str | None = None, *, every_task: bool = False) -> Table:
    """A table over the paper's data sets below `root`, or over offline tasks.

    A data set's folder below `root` may have any of the names in use.

    Args:
        number: one of `table_numbers`.
        root: folder of the data sets; None for offline tasks.
        every_task: with the offline tasks that a large table leaves out unless they are asked for.

    Raises:
        ValueError: no such table, several folders of a data set, or rows that cannot be told apart.
    """
    suite = suite_of(number)
    spec = read_spec()
    raw = spec["tables"][number]
    scale = "offline" if root is None else "real"
    numbers = spec["scales"][scale]
    option, values = next(iter(raw["sweep"].items())) if "sweep" in raw else (None, (None,))
    rows, unavailable = [], {}
    for entry in [*raw["rows"], *raw.get("controls", spec["controls"])]:
        for value in values:
            row = _row(entry, raw["paper_columns"])
            if option is not None:
                adapter = {**row.adapter, option: value}
                row = dataclasses.replace(row, title=f"{row.title}, {option} {value}", adapter=adapter, swept=value)
            reason = why_not(row)
            if reason is None:
                rows.append(row)
            else:
                unavailable[row.title] = reason
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"table {number}: results are kept by variant, and more than one row is {', '.join(twice)}")
    suffixes = [""] if option is None else [f"/{value}" for value in values]
    pairs = [(better, worse) for better, worse in raw["claims"]]
    others = dict.fromkeys(row.variant for row in rows if row.origin != "paper")
    added = raw["added"] if "added" in raw else [(pairs[0][0], other) for other in others]
    own = raw.get("offline", {}) if root is None else {}
    wanted = None if every_task else own.get("tasks")
    return Table(
        number=number,
        title=raw["title"],
        note=raw.get("note", ""),
        scale=scale,
        model=numbers["models"][raw["model"]],
        bottleneck=numbers.get("bottleneck", raw["bottleneck"]),
        tasks=tuple(
            _task(entry, root) for entry in spec["suites"][suite][scale] if wanted is None or entry["name"] in wanted
        ),
        rows=tuple(rows),
        columns=tuple(raw["paper_columns"]),
        claims=tuple((better + end, worse + end) for better, worse in pairs for end in suffixes),
        added=tuple((one + end, other + end) for one, other in added for end in suffixes),
        unavailable=unavailable,
        rates=own.get("rates", {}),
        tune=own.get("tune", {}),
        by_task=raw.get("by_task", False),
        one_recipe=raw.get("one_recipe", False),
        sweep=option,
    )


def of_tasks(table: Table, names: Collection[str]) -> Table:
    """Some tasks of a table; of the paper's own data sets, its figures that are means over others too are left away.

    Raises:
        ValueError: a task that it has not.
    """
    known = list(dict.fromkeys(task.name for task in table.tasks))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"tasks: expected some of {'; '.join(known)} for table {table.number}, got {'; '.join(unknown)}"
        )
    kept = tuple(task for task in table.tasks if task.name in names)
    if table.scale != "real" or len(kept) == len(table.tasks):
        return dataclasses.replace(table, tasks=kept)
    partial = {task.group for task in table.tasks if task not in kept}
    columns = {task.name for task in kept} | {task.group for task in kept} - partial
    rows = (dataclasses.replace(row, paper=_only(row.paper, columns)) for row in table.rows)
    return dataclasses.replace(table, tasks=kept, rows=tuple(rows))


def _only(figures: Mapping[str, float], columns: Collection[str]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if name in columns}


def _task(entry: Mapping[str, Any], root: str | None) -> Task:
    values = {"tuning_data": entry["data"], "tuned_on": entry["name"], **entry}
    if root is not None:
        values |= {key: _below(root, values[key]) for key in ("data", "tuning_data")}
    return Task(**values)


def _below(root: str, address: str) -> str:
    """An address of the file with its folder below `root`, whatever that folder's name."""
    kind, _, place = address.partition(":")
    if not place.startswith("{root}/"):
        return address
    return f"{kind}:{find_folder(whole_path(root), BENCHMARKS[kind], place.removeprefix('{root}/'))}"


def _row(entry: Mapping[str, Any], columns: list[str]) -> Row:
    return Row(
        variant=entry["variant"],
        title=entry.get("title", read_spec()["variants"][entry["variant"]]["title"]),
        adapter=entry.get("adapter", {}),
        mechanism=entry.get("mechanism"),
        paper=dict(zip(columns, entry["paper"], strict=True)) if "paper" in entry else {},
        paper_params=entry.get("paper_params"),
        origin=entry.get("origin", "paper"),
        tune=entry.get("tune", {}),
    )


def why_not(row: Row) -> str | None:
    """Why a row cannot be trained by this version; None where it can."""
    variant = read_spec()["variants"][row.variant]
    style = _style(variant, row)
    if variant["method"] not in METHODS:
        return f"there is no method {variant['method']!r}"
    if style not in STYLES:
        return f"there is no style {style!r}"
    return None


def _style(variant: Mapping[str, Any], row: Row) -> str:
    style: str = {**variant.get("adapter", {}), **row.adapter}.get("style", DEFAULT_STYLE)
    return style


def style_of(row: Row) -> str:
    """The style of a row's adapters, whether its method has any or not."""
    return _style(read_spec()["variants"][row.variant], row)


def candidates(table: Table, row: Row) -> list[Numbers]:
    """The numbers that validation chooses from: learning rates, and where the variant says so dropout or scale."""
    variant = read_spec()["variants"][row.variant]
    scale = read_spec()["scales"][table.scale]
    rates, style = {**scale["rates"], **table.rates}, _style(variant, row)
    kind = variant.get("rates", style if style in rates else "adapter")
    grid = {scale["rate"]: rates[kind], **variant.get("tune", {})}
    grid |= {name: values for name, values in table.tune.items() if name in grid} | {**row.tune, **table.tune_more}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def tuned_row(row: Row) -> Row:
    """The row whose chosen numbers this one takes over: an ablation takes its method's, as in the paper.

    The rows of a sweep take over their method's at the table's own value.
    """
    variant = read_spec()["variants"][row.variant].get("tuned_as", row.variant)
    if row.swept is not None:
        return _row({"variant": variant}, [])
    if variant == row.variant:
        return row
    return _row({"variant": variant, "adapter": dict(row.adapter)}, [])


@dataclass(frozen=True)
class Changes:
    """What a user says of a whole grid.

    Attributes:
        recipe: overrides, for a quick look.
        checkpoint: weights of the backbone; a path, made whole.
        data_root: of data sets that need one, made whole.
        mixed_precision, workers: as in `Settings`.
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    data_root: str | None = None
    mixed_precision: str = "no"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoint", "data_root"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_path(getattr(self, name)))


def cell_settings(
    table: Table, row: Row, task: Task, chosen: Numbers, seed: int, changes: Changes, *, tuning: bool
) -> Settings:
    """The settings of one run.

    Args:
        table, row, task: the cell.
        chosen: one of `candidates`.
        seed: of the data; all else is drawn from `seed + INITIAL_SEED`.
        changes: of the whole grid.
        tuning: on the data for tuning rather than the final one.
    """
    variant = read_spec()["variants"][row.variant]
    scale = read_spec()["scales"][table.scale]
    shape, rest = split_numbers(chosen)
    numbers = {**scale["recipe"], **task.recipe, **variant.get("recipe", {}), **changes.recipe, **rest}
    adapter = {"bottleneck": table.bottleneck, **variant.get("adapter", {}), **row.adapter, **shape}
    return Settings(
        model=table.model,
        checkpoint=changes.checkpoint,
        data=task.tuning_data if tuning else task.data,
        data_root=changes.data_root,
        data_seed=seed,
        labels_per_class=task.labels_per_class,
        label_noise=task.label_noise,
        method=variant["method"],
        adapter=AdapterOptions(**adapter),
        passes=variant.get("passes"),
        recipe=make_recipe("paper", table.model, seed=seed + INITIAL_SEED, **numbers),
        mixed_precision=changes.mixed_precision,
        workers=changes.workers,
    )
