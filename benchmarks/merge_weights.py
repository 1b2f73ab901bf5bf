"""Merging with a weight for each expert, or one common factor, chosen by validation likelihood, against the mean.

    python benchmarks/merge_weights.py benchmarks/accuracy/merge_weights

Each run trains a MoSA of four experts, one per sample, as in table ours-1 or multiplied by N as in table ours-2, at the
learning rate that validation chose there; then it is merged in three ways and tested once with each. The weights are
those of the whole model, one an expert; 1 is the mean. Eight seeds. Runs that are done are not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call

from mosa_kernels.nn.projection import Projection
from mosa_kernels.train.evaluate import number_of_experts, predict
from mosa_kernels.train.folder import read_json, write_json
from mosa_kernels.train.loop import Trainer
from mosa_kernels.train.side_by_side import run_side_by_side
from mosa_kernels.train.table_cells import Cell, run_cell
from mosa_kernels.train.table_grid import Choice, Measured
from mosa_kernels.train.table_spec import Changes, Table, cell_settings, of_tasks, read_table
from mosa_kernels.train.variant_report import Variant, command_of, write_variants

TRAINED = {"sample": ("ours-1", "mosa-sample", "as it is"), "scaled": ("ours-2", "mosa-scaled", "x N")}
WAYS = {"mean": "the mean", "weights": "a weight for each expert", "factor": "a factor for all"}
TASKS = ("digits, 20 labels a class", "count")
RATE = 0.03  # that both tables chose on both tasks
FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
STEPS = 20  # of L-BFGS on four numbers


class Weighted(nn.Module):
    """A model whose experts are multiplied by weights before they are merged.

    Args:
        model: with split adapters.
        weights: float32 [N]; ones leave the model as it is.
    """

    def __init__(self, model: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.model = model
        self.weights = nn.Parameter(weights)
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        changed = {}
        for name, projection in self.model.named_modules():
            if not isinstance(projection, Projection) or projection.activity is None:
                continue
            if projection.assignment is not None:
                start: Tensor | float = 0.0 if projection.initial is None else projection.initial
                moved = projection.weight - start
                changed[f"{name}.weight"] = start + moved * self.weights[projection.assignment.long()]
            if projection.bias is not None and projection.bias.dim() == 2:
                changed[f"{name}.bias"] = projection.bias * self.weights[:, None]
        logits: Tensor = functional_call(self.model, changed, (images,))
        return logits


def fitted_weights(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The weights [N] that make the labels of these batches likeliest, by L-BFGS from ones."""
    device = next(model.parameters()).device
    weighted = Weighted(model.eval(), torch.ones(number_of_experts(model), device=device))
    optimizer = torch.optim.LBFGS([weighted.weights], max_iter=STEPS, line_search_fn="strong_wolfe")
    count = sum(len(labels) for _, labels in batches)

    def closure() -> Tensor:
        total = torch.zeros((), device=device)
        weighted.weights.grad = torch.zeros_like(weighted.weights)
        for images, labels in batches:
            loss = F.cross_entropy(weighted(images), labels, reduction="sum") / count
            (gradient,) = torch.autograd.grad(loss, weighted.weights)
            weighted.weights.grad += gradient
            total += loss.detach()
        return total

    optimizer.step(closure)
    return weighted.weights.detach()


def best_factor(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The one of `FACTORS` that makes the labels of these batches likeliest; of equals the one closest to the mean."""
    ones = torch.ones(number_of_experts(model), device=next(model.parameters()).device)
    found = {each: predict(Weighted(model, each * ones), batches).nll for each in FACTORS}
    return min(found, key=lambda each: (found[each], abs(math.log(each))))


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained model.

    Attributes:
        trained: a key of `TRAINED`.
        task: its name.
        cell: what is run, merged by the mean.
    """

    trained: str
    task: str
    cell: Cell

    def path(self, folder: Path) -> Path:
        return self.cell.path(folder)


def make_runs(tasks: Sequence[str], bottleneck: int | None, seeds: int, changes: Changes) -> list[Run]:
    """Both models on every task with every seed."""
    runs = []
    for key, (number, variant, _) in TRAINED.items():
        table = table_with(number, tasks, bottleneck)
        row = next(row for row in table.rows if row.variant == variant)
        for task, seed in itertools.product(table.tasks, range(seeds)):
            settings = cell_settings(table, row, task, {"lr": RATE}, seed, changes, tuning=False)
            runs.append(Run(key, task.name, Cell(f"{key} {task.name} seed {seed}", settings, test=True)))
    return runs


def table_with(number: str, tasks: Sequence[str], bottleneck: int | None) -> Table:
    """A table with some of its tasks.

    Raises:
        BadParameter: a task is unknown.
    """
    try:
        table = of_tasks(read_table(number), tasks)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--task") from error
    return dataclasses.replace(table, bottleneck=bottleneck or table.bottleneck)


def keep(run: Run, folder: Path) -> dict[str, Any]:
    """Runs and writes the file, complete or not at all; what is there is only read."""
    path = run.path(folder)
    if path.is_file():
        result: dict[str, Any] = read_json(path)
        return result
    trainers: list[Trainer] = []
    result = run_cell(run.cell, arrange=trainers.append)
    if result.get("failed"):
        raise RuntimeError(f"{run.cell.label}: {result['failed']}")
    (trainer,) = trainers
    model, batches = trainer.runner, list(trainer.validation_loader)
    weights, factor = fitted_weights(model, batches), best_factor(model, batches)
    merged = {"weights": weights, "factor": torch.full_like(weights, factor)}
    result["weights"], result["factor"] = weights.tolist(), factor
    result["measured"] |= {
        way: predict(Weighted(model, each), trainer.test_loader).as_dict() for way, each in merged.items()
    }
    write_json(path, result)
    return result


def report(table: Table, results: Mapping[Run, Any], command: str, output: Path) -> str:
    """Writes table, picture and record, which name the command; returns the Markdown."""
    variants, measured = [], {}
    for (key, (_, _, scaled)), (way, by) in itertools.product(TRAINED.items(), WAYS.items()):
        name = f"{key}-{way}"
        against = [] if way == "mean" else [f"{key}-mean"]
        variants.append(Variant(name, f"an expert of four per sample, {scaled}: merged by {by}", against))
        measured[name] = {
            task.name: measured_of(
                [each for run, each in results.items() if (run.trained, run.task) == (key, task.name)], way
            )
            for task in table.tasks
        }
    fitted = {
        key: [
            {"task": run.task, "weights": each["weights"], "factor": each["factor"]}
            for run, each in results.items()
            if run.trained == key
        ]
        for key in TRAINED
    }
    chosen = [each["factor"] for each in results.values()]
    spent = sum(each["seconds"] for each in results.values())
    seeds = len(chosen) // len(fitted) // len(table.tasks)
    grid = ", ".join(f"{factor:g}" for factor in FACTORS)
    return write_variants(
        output / "merge_weights",
        f"Weights to merge by: {table.model}, r = {table.bottleneck}, {seeds} seed(s)",
        table,
        variants,
        measured,
        note=f"Test accuracy in percent, ± over seeds; learning rate {RATE:g}. Weights and factors (1: the mean) are "
        f"those that make the labels of the validation images likeliest; of the factors {grid}, 1 was chosen in "
        f"{chosen.count(1.0)} of {len(chosen)} runs.",
        how=f"`{command}`, {spent:.0f} s of one thread",
        record={"lr": RATE, "fitted": fitted, "command": command},
    )


def measured_of(results: Sequence[Mapping[str, Any]], way: str) -> Measured:
    return Measured(
        accuracies=tuple(each["measured"][way]["accuracy"] for each in results),
        choice=Choice({"lr": RATE}, math.nan, ()),
        parameters=results[0]["parameters"]["adapter"],
        seconds=statistics.fmean(each["seconds"] for each in results),
    )


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the table, the picture and the runs' files.")],
    task: Annotated[list[str] | None, typer.Option(help="Tasks of table ours-2; repeat.")] = None,
    bottleneck: Annotated[int | None, typer.Option(help="r; the tables' where not given.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Another length of each run.", min=1)] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100)] = 8,
    workers: Annotated[int, typer.Option(help="Processes of one thread each; 1: this one.", min=1)] = 2,
) -> None:
    """Compares ways to weigh the experts that are merged."""
    command = command_of("benchmarks/merge_weights.py", main, locals())
    console = Console()
    tasks = task or TASKS
    table = table_with("ours-2", tasks, bottleneck)
    runs = make_runs(tasks, bottleneck, seeds, Changes(recipe={} if epochs is None else {"epochs": epochs}))
    folder = output / "cells"
    folder.mkdir(parents=True, exist_ok=True)

    def tell(run: Run, result: Mapping[str, Any]) -> None:
        accuracies = ", ".join(f"{way} {result['measured'][way]['accuracy']:.2f} %" for way in WAYS)
        console.print(f"{run.cell.label}: {accuracies} ({result['seconds']:.0f} s)", highlight=False)

    run_side_by_side(
        [run for run in runs if not run.path(folder).is_file()], functools.partial(keep, folder=folder), workers, tell
    )
    results = {run: keep(run, folder) for run in runs}
    console.print(report(table, results, command, output), highlight=False, markup=False)


if __name__ == "__main__":
    typer.run(main)
