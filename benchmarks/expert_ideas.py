"""What else experts could do than be drawn at random everywhere, always: each idea against MoSA without it.

    python benchmarks/expert_ideas.py benchmarks/accuracy/ideas
    python benchmarks/expert_ideas.py benchmarks/accuracy/ideas_scale --table ours-3

Every idea is the MoSA of `table ours-2` that does best (an expert of two per sample, multiplied by N; two passes) with
one thing changed, at what validation chose for it there, as ablations are run in the paper, beside that table's
controls at what it chose for them. Other tables chose the scale as well (ours-3), or have other tasks (ours-4, ours-5).
Eight seeds, each tested once. Runs that are done are not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import mosa_kernels as mk
from mosa_kernels.backends.arguments import MERGED
from mosa_kernels.nn.projection import Projection
from mosa_kernels.train.folder import read_json, write_json
from mosa_kernels.train.loop import Trainer
from mosa_kernels.train.methods import Numbers, number_words
from mosa_kernels.train.objective import Objective
from mosa_kernels.train.side_by_side import run_side_by_side
from mosa_kernels.train.table_cells import Cell, accuracy_of, find_result, run_and_keep, run_cell
from mosa_kernels.train.table_grid import Choice, Measured
from mosa_kernels.train.table_spec import Changes, Row, Table, Task, cell_settings, of_tasks, read_table
from mosa_kernels.train.variant_report import Variant, command_of, write_variants

CHOICES = Path(__file__).parent / "accuracy" / "offline"  # what validation chose in each table
TABLES = ("ours-2", "ours-3", "ours-4", "ours-5")
SHARE = 0.25  # of the epochs, for what happens in the beginning or the end
Choose = Callable[[Tensor, Trainer], "Tensor | int | None"]  # labels of a batch, trainer -> experts; None: at random


@dataclass(frozen=True)
class Directed:
    """An objective whose experts are chosen by a rule.

    Args:
        objective: the loss.
        choose: which expert each sample runs.
        trainer: whose epochs the rule may ask for.
    """

    objective: Objective
    choose: Choose
    trainer: Trainer

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        experts = self.choose(labels, self.trainer)
        if experts is None:
            return self.objective(model, images, labels)
        with mk.experts_per_sample(model, experts):
            return self.objective(model, images, labels)


def elapsed(trainer: Trainer) -> float:
    """The share of the epochs that is complete."""
    return trainer.progress.epochs_done / trainer.recipe.epochs


def merged_first(labels: Tensor, trainer: Trainer) -> int | None:
    """A dense adapter that is split later: N grows from 1."""
    return MERGED if elapsed(trainer) < SHARE else None


def merged_last(labels: Tensor, trainer: Trainer) -> int | None:
    """Experts that end as one dense adapter: N falls to 1."""
    return MERGED if elapsed(trainer) >= 1 - SHARE else None


def by_class(labels: Tensor, trainer: Trainer) -> Tensor:
    """Each expert has classes of its own."""
    return labels % experts_of(trainer.model)


def by_class_then_merged(labels: Tensor, trainer: Trainer) -> Tensor | int:
    """The same, with a dense end."""
    last = merged_last(labels, trainer)
    return by_class(labels, trainer) if last is None else last


class LearnedAssignment:
    """Entries that the classes choose: a dense beginning, then each expert owns what its classes pull at most."""

    def __init__(self) -> None:
        self.settled = False

    def __call__(self, labels: Tensor, trainer: Trainer) -> Tensor | int:
        if elapsed(trainer) < SHARE:
            return MERGED
        if not self.settled:
            assign_by_pull(trainer)
            self.settled = True
        return by_class(labels, trainer)


class Counts:
    """N by schedule: a number of experts for each equal part of the epochs. Experts join in pairs, or part.

    One expert is the merged adapter. Biases have to be shared: where experts join, nobody would run some rows.
    """

    def __init__(self, *counts: int) -> None:
        self.counts, self.now = counts, 0

    def __call__(self, labels: Tensor, trainer: Trainer) -> int | None:
        count = self.counts[int(elapsed(trainer) * len(self.counts))]
        if count == 1:
            return MERGED
        if not self.now:
            self.finest = [layer.up.get_buffer("assignment").clone() for layer in adapters(trainer.model)]
        if count != self.now:
            self.now = count
            for layer, owners in zip(adapters(trainer.model), self.finest, strict=True):
                layer.up.get_buffer("assignment").copy_(owners // (max(self.counts) // count))
                layer.num_experts = layer.sampler.num_experts = count
                layer.expert_scale = float(count)
        return None


def adapters(model: nn.Module) -> list[mk.FusedMoSAAdapter]:
    return [each for each in model.modules() if isinstance(each, mk.FusedMoSAAdapter)]


def split_projections(model: nn.Module) -> list[Projection]:
    """The up-projections that are split, in module order."""
    return [each for each in model.modules() if isinstance(each, Projection) and each.assignment is not None]


def experts_of(model: nn.Module) -> int:
    return 1 + max(int(each.assignment.max()) for each in split_projections(model) if each.assignment is not None)


def assign_by_pull(trainer: Trainer) -> None:
    """Gives each entry of w_up to the classes whose gradients on it are larger; both experts own as many."""
    model, projections = trainer.model, split_projections(trainer.model)
    if experts_of(model) != 2:
        raise ValueError(f"num_experts: a learned assignment is for 2 experts, got {experts_of(model)}")
    pull = [torch.zeros(2, *each.weight.shape) for each in projections]
    weights = [each.weight for each in projections]
    for images, labels in trainer.loaders.train:
        for expert in range(2):
            mine = by_class(labels, trainer) == expert
            if mine.any():
                with mk.experts_per_sample(model, MERGED):
                    loss = F.cross_entropy(model(images[mine]), labels[mine])
                for total, gradient in zip(pull, torch.autograd.grad(loss, weights), strict=True):
                    total[expert] += gradient.square()
    for each, total in zip(projections, pull, strict=True):
        assert each.assignment is not None
        share = total[1] / total.sum(0).clamp_min(1e-30)
        rank = share.flatten().argsort().argsort().view_as(share)
        each.assignment.copy_(rank * 2 // share.numel())


@dataclass(frozen=True)
class Idea:
    """One thing changed.

    Attributes:
        key, title: for files and for readers.
        variant: the row that it starts from, in the words that all tables share.
        adapter: overrides of its adapter options.
        passes: of each batch; None: the variant's.
        choose: makes the rule by which experts are chosen; None: at random.
        against: the key of what it is held against.
        dropout: in place of what was chosen.
        origin: "ours" or "control"; what is ours is held against every control, too.
    """

    key: str
    title: str
    variant: str = "mosa-n2"
    adapter: Mapping[str, Any] = field(default_factory=dict)
    passes: int | None = None
    choose: Callable[[], Choose] | None = None
    against: str = "random"
    dropout: str | None = None
    origin: str = "ours"


def variant_in(table: Table, idea: Idea) -> str:
    """The row of a table that an idea starts from: ours-2, whose scale is given, has names of its own for some."""
    if table.number != "ours-2":
        return f"{idea.variant}-own-scale"
    own = {"mosa-n2": "mosa-scaled-n2", "dropout": "dropout-wide", "dropout-two-pass": "dropout-two-pass-wide"}
    return own.get(idea.variant, idea.variant)


IDEAS = (
    Idea("random", "MoSA, an expert of two per sample x N"),
    Idea("deep", "experts in the deeper half of the blocks alone", adapter={"num_experts": [1, 1, 2, 2]}),
    Idea("shallow", "experts in the shallower half alone", adapter={"num_experts": [2, 2, 1, 1]}),
    Idea("rising", "1, 2, 3 and 4 experts with depth", adapter={"num_experts": [1, 2, 3, 4]}),
    Idea("rising-steep", "1, 3, 5 and 7 experts with depth", adapter={"num_experts": [1, 3, 5, 7]}),
    Idea("falling", "4, 3, 2 and 1 experts with depth", adapter={"num_experts": [4, 3, 2, 1]}),
    Idea("merged-first", "merged in the first quarter (dense warm-up)", choose=lambda: merged_first),
    Idea("merged-last", "merged in the last quarter", choose=lambda: merged_last),
    Idea("four", "an expert of four throughout", adapter={"num_experts": 4, "expert_bias": False}),
    Idea(
        "counts-fall",
        "four experts, then two, then one",
        adapter={"num_experts": 4, "expert_bias": False},
        choose=lambda: Counts(4, 2, 1),
    ),
    Idea(
        "counts-rise",
        "one, then two, then four experts",
        adapter={"num_experts": 4, "expert_bias": False},
        choose=lambda: Counts(1, 2, 4),
    ),
    Idea("one-pass", "one pass, without consistency", passes=1),
    Idea(
        "class",
        "one pass, an expert for each half of the classes",
        passes=1,
        choose=lambda: by_class,
        against="one-pass",
    ),
    Idea(
        "class-merged-last",
        "the same, merged in the last quarter",
        passes=1,
        choose=lambda: by_class_then_merged,
        against="one-pass",
    ),
    Idea("anchored", "anchored: a merged pass and one of random experts", "mosa-anchored-n2"),
    Idea(
        "anchored-class",
        "anchored, an expert for each half of the classes",
        "mosa-anchored-n2",
        choose=lambda: by_class,
        against="anchored",
    ),
    Idea(
        "anchored-learned",
        "the same, which own what their classes pull at",
        "mosa-anchored-n2",
        choose=LearnedAssignment,
        against="anchored",
    ),
    Idea(
        "anchored-rising",
        "anchored, 1, 2, 3 and 4 experts with depth",
        "mosa-anchored-n2",
        adapter={"num_experts": [1, 2, 3, 4]},
        against="anchored",
    ),
    Idea("adaptformer", "AdaptFormer", "adaptformer", against="adaptformer", origin="control"),
    Idea("dropout", "AdaptFormer + dropout", "dropout", against="adaptformer", origin="control"),
    Idea(
        "dropout-two-pass",
        "AdaptFormer + dropout, two passes + KL",
        "dropout-two-pass",
        against="adaptformer",
        origin="control",
    ),
    *(
        Idea(
            key,
            f"the same, dropout {words} with depth",
            "dropout-two-pass",
            against="dropout-two-pass",
            dropout=dropout,
            origin="control",
        )
        for key, words, dropout in (
            ("dropout-rising", "0, 0.1, 0.2 and 0.3", "0:0.3"),
            ("dropout-rising-high", "0, 0.2, 0.4 and 0.6", "0:0.6"),
        )
    ),
)


@dataclass(frozen=True)
class Run:
    """One run of an idea."""

    idea: str
    task: str
    cell: Cell

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What is in its file; None where it is still to be run. Where nothing directs the experts, tables share it."""
        if self.choose is None:
            return find_result(self.cell, folder)
        path = self.path(folder)
        return read_json(path) if path.is_file() else None

    def path(self, folder: Path) -> Path:
        """The file of a run whose experts are directed."""
        digest = hashlib.sha256(f"{self.idea}/{self.cell.identity}".encode()).hexdigest()[:12]
        return folder / f"{self.idea}-{self.cell.settings.data_seed}-{digest}.json"

    @property
    def choose(self) -> Callable[[], Choose] | None:
        return next(idea.choose for idea in IDEAS if idea.key == self.idea)


def chosen_numbers(table: Table, ideas: Sequence[Idea], lr: float | None = None) -> dict[tuple[str, str], Numbers]:
    """What validation chose for each idea on each task of a table, which its record holds.

    Args:
        table: which.
        ideas: what they set themselves is left out.
        lr: in place of what was chosen.
    """
    rows, numbers = read_json(CHOICES / f"{table.number}.json")["rows"], {}
    for idea, task in itertools.product(ideas, table.tasks):
        chosen = dict(rows[variant_in(table, idea)]["tasks"][task.name]["choice"]["numbers"])
        if idea.dropout is not None:
            chosen["dropout"] = idea.dropout
        numbers[idea.key, task.name] = chosen if lr is None else {**chosen, "lr": lr}
    return numbers


def make_runs(
    table: Table,
    ideas: Sequence[Idea],
    numbers: Mapping[tuple[str, str], Numbers],
    seeds: Sequence[int],
    changes: Changes,
) -> list[Run]:
    """Every idea on every task with every seed."""
    runs = []
    for idea, task, seed in itertools.product(ideas, table.tasks, seeds):
        row = dataclasses.replace(row_of(table, variant_in(table, idea)), adapter=idea.adapter)
        settings = cell_settings(table, row, task, numbers[idea.key, task.name], seed, changes, tuning=False)
        if idea.passes is not None:
            settings = dataclasses.replace(settings, passes=idea.passes)
        runs.append(Run(idea.key, task.name, Cell(f"{idea.key} {task.name} seed {seed}", settings, test=True)))
    return runs


def row_of(table: Table, variant: str) -> Row:
    return next(row for row in table.rows if row.variant == variant)


def keep(run: Run, folder: Path) -> dict[str, Any]:
    """Runs and writes the file, complete or not at all; what is there is only read."""
    found, choose = run.result(folder), run.choose
    if found is not None:
        return found
    if choose is None:
        return run_and_keep(run.cell, folder)
    rule = choose()

    def arrange(trainer: Trainer) -> None:
        trainer.objective = Directed(trainer.objective, rule, trainer)  # type: ignore[assignment]

    result = run_cell(run.cell, arrange=arrange)
    write_json(run.path(folder), result)
    return result


def report(
    table: Table,
    ideas: Sequence[Idea],
    numbers: Mapping[tuple[str, str], Numbers],
    results: Mapping[Run, Any],
    command: str,
    output: Path,
) -> str:
    """Writes table, picture and record, which name the command; returns the Markdown."""
    measured: dict[str, dict[str, Measured]] = {}
    for idea, task in itertools.product(ideas, table.tasks):
        found = [result for run, result in results.items() if (run.idea, run.task) == (idea.key, task.name)]
        measured.setdefault(idea.key, {})[task.name] = Measured(
            accuracies=tuple(accuracy_of(result) for result in found),
            choice=Choice(numbers[idea.key, task.name], math.nan, ()),
            parameters=found[0]["parameters"]["adapter"],
            seconds=statistics.fmean(result["seconds"] for result in found),
        )
    controls = [idea.key for idea in ideas if idea.origin == "control"]
    variants = [
        Variant(
            idea.key,
            idea.title,
            [key for key in (idea.against, *(controls if idea.origin == "ours" else ())) if key != idea.key],
            idea.origin,
        )
        for idea in ideas
    ]
    seeds = len(next(iter(measured.values()))[table.tasks[0].name].accuracies)
    spent = sum(result["seconds"] for result in results.values())
    return write_variants(
        output / "ideas",
        f"What else experts could do: {table.model}, r = {table.bottleneck}, {seeds} seed(s)",
        table,
        variants,
        measured,
        note="Test accuracy in percent, ± over seeds. " + told_numbers(ideas, table.tasks, numbers),
        how=f"`{command}`, {spent:.0f} s of one thread",
        record={
            "numbers": {idea.key: {task.name: numbers[idea.key, task.name] for task in table.tasks} for idea in ideas},
            "command": command,
        },
    )


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the table, the picture and the runs' files.")],
    idea: Annotated[list[str] | None, typer.Option(help="Only these, by key, and what they are held against.")] = None,
    table: Annotated[str, typer.Option(help="Whose tasks and choices: " + ", ".join(TABLES) + ".")] = TABLES[0],
    task: Annotated[list[str] | None, typer.Option(help="Some of its tasks; repeat.")] = None,
    lr: Annotated[float | None, typer.Option(help="In place of what the table chose.", min=0)] = None,
    bottleneck: Annotated[int, typer.Option(help="r.", min=1)] = 64,
    epochs: Annotated[int | None, typer.Option(help="Another length of each run.", min=1)] = None,
    seeds: Annotated[int, typer.Option(help="How many.", min=1, max=100)] = 8,
    first_seed: Annotated[int, typer.Option(help="To repeat what was found with others.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes of one thread each; 1: this one.", min=1)] = 2,
) -> None:
    """Compares ways to use experts."""
    command = command_of("benchmarks/expert_ideas.py", main, locals())
    console, began = Console(), time.perf_counter()
    ideas = chosen_ideas(idea)
    compared = chosen_tasks(dataclasses.replace(chosen_table(table), bottleneck=bottleneck), task)
    numbers = chosen_numbers(compared, ideas, lr)
    changes = Changes(recipe={} if epochs is None else {"epochs": epochs})
    runs = make_runs(compared, ideas, numbers, range(first_seed, first_seed + seeds), changes)
    folder = output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    missing, done = [run for run in runs if run.result(folder) is None], itertools.count(1)

    def tell(run: Run, result: Mapping[str, Any]) -> None:
        accuracy = accuracy_of(dict(result))
        shown = "failed" if accuracy is None else f"{accuracy:.2f} %"
        console.print(
            f"{next(done)}/{len(missing)} {run.cell.label}: {shown} ({result['seconds']:.0f} s)", highlight=False
        )

    run_side_by_side(missing, functools.partial(keep, folder=folder), workers, tell)
    markdown = report(compared, ideas, numbers, {run: keep(run, folder) for run in runs}, command, output)
    console.print(markdown, highlight=False, markup=False)
    console.print(f"{time.perf_counter() - began:.0f} s; written to {output}/", highlight=False)


def told_numbers(ideas: Sequence[Idea], tasks: Sequence[Task], numbers: Mapping[tuple[str, str], Numbers]) -> str:
    """What every row has as the first has it, and what others have."""
    first = numbers[ideas[0].key, tasks[0].name]
    others = [
        f"{idea.title}: {words(its)}" + (f" on {task.name}" if len(tasks) > 1 else "")
        for idea, task in itertools.product(ideas, tasks)
        if (its := numbers[idea.key, task.name]) != first
    ]
    return "; ".join([f"Every row has {words(first)}, as validation chose it for the first", *others]) + "."


def words(numbers: Numbers) -> str:
    return ", ".join(itertools.starmap(number_words, numbers.items()))


def chosen_ideas(keys: Sequence[str] | None) -> tuple[Idea, ...]:
    """Those of some keys, with what they are held against; None: all.

    Raises:
        BadParameter: a key is unknown.
    """
    known = {idea.key: idea for idea in IDEAS}
    unknown = sorted(set(keys or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(known)}, got {', '.join(unknown)}", param_hint="--idea")
    wanted = set(keys or known) | {known[key].against for key in keys or ()}
    return tuple(idea for idea in IDEAS if idea.key in wanted)


def chosen_table(name: str) -> Table:
    """The table of that name.

    Raises:
        BadParameter: none whose choices are used here.
    """
    if name not in TABLES:
        raise typer.BadParameter(f"expected one of {', '.join(TABLES)}, got {name}", param_hint="--table")
    return read_table(name)


def chosen_tasks(table: Table, names: Sequence[str] | None) -> Table:
    """The table with some of its tasks; None: all.

    Raises:
        BadParameter: a task is unknown.
    """
    try:
        return of_tasks(table, names) if names else table
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--task") from error


if __name__ == "__main__":
    typer.run(main)
