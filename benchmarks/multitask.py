"""Several tasks in one adapter: an expert for each task, against one adapter for all and against narrow ones.

    python benchmarks/multitask.py benchmarks/accuracy/multitask

One frozen backbone, one classifier a task, every update on as many images of each task. At inference the task of an
image is known. Each variant's learning rate (and scale) is chosen by the validation accuracy of four seeds of their
own; then every seed tests once. Runs that are done are not done again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import mosa_kernels as mk
from mosa_kernels._machine import machine
from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.data.loaders import Loaders, make_loaders, set_epoch
from mosa_kernels.data.open import open_data
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.train.backbones import create_backbone, data_config
from mosa_kernels.train.comparison_report import markdown_table, spread
from mosa_kernels.train.evaluate import predict
from mosa_kernels.train.folder import read_json, versions, write_json, write_text
from mosa_kernels.train.loop import training_mode
from mosa_kernels.train.methods import make_optimizer
from mosa_kernels.train.paired_tests import paired_t, signed_rank
from mosa_kernels.train.plots import save_figure
from mosa_kernels.train.recipe import make_recipe
from mosa_kernels.train.schedule import Schedule
from mosa_kernels.train.settings import INITIAL_SEED
from mosa_kernels.train.setup import seed_everything
from mosa_kernels.train.side_by_side import run_side_by_side
from mosa_kernels.train.table_figure import COLOURS
from mosa_kernels.train.table_summary import Difference
from mosa_kernels.train.variant_report import command_of

TASKS = ("offline:digits", "offline:count", "offline:location", "offline:orientation")
TUNING_SEEDS = (100, 101, 102, 103)
RATES = (0.01, 0.02, 0.04)
PER_TASK = 10  # images of each task in an update
EPOCHS = 10  # into which the schedule divides the updates; the first warms up, as a tenth does in the paper
DROPOUT = 0.1
MEAN = "mean"
CRITERION = mk.MoSALoss(beta=0.0)  # of one pass, cross-entropy alone
OURS = "mosa"  # the key of what the others are compared with


@dataclass(frozen=True)
class Variant:
    """One way to keep several tasks.

    Attributes:
        key, title: its name, for files and for readers.
        per_task: whether each image runs the expert of its task.
        adapter: of `MoSAConfig`; its bottleneck is a factor on the command's.
        passes: of each batch; 2 are held to each other by their symmetric KL divergence.
        tuned_as: the variant whose learning rate this one takes over.
        origin: "control" or "ours".
    """

    key: str
    title: str
    per_task: bool
    adapter: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    tuned_as: str = ""
    origin: str = "control"


def variants(tasks: int) -> tuple[Variant, ...]:
    """The comparison. A bottleneck that is divided into units by task is a narrow adapter for each task."""
    experts = {"mode": "mosa", "num_experts": tasks, "expert_per": "sample"}
    units = {**experts, "granularity": "column"}
    return (
        Variant("shared", "one AdaptFormer for all tasks", False, {"mode": "dense"}),
        Variant("dropout", f"one AdaptFormer, dropout {DROPOUT}", False, {"mode": "dense", "dropout": DROPOUT}),
        Variant(
            "dropout-two-pass",
            f"one AdaptFormer, dropout {DROPOUT}, two passes + KL",
            False,
            {"mode": "dense", "dropout": DROPOUT},
            2,
        ),
        Variant("narrow", f"an AdaptFormer of r / {tasks} for each task", True, units),
        Variant("mosa", "MoSA, an expert for each task", True, experts, origin="ours"),
        Variant(
            "mosa-one-bias",
            "MoSA, an expert for each task, one bias for all",
            True,
            {**experts, "expert_bias": False},
            tuned_as="mosa",
            origin="ours",
        ),
        Variant(
            "separate", f"an AdaptFormer of r for each task ({tasks} x the storage)", True, {**units, "wide": tasks}
        ),
    )


class Numbers(NamedTuple):
    """A learning rate, and a scale of the adapters or None for the style's own."""

    lr: float
    scale: float | None

    def __str__(self) -> str:
        return f"{self.lr:g}" if self.scale is None else f"{self.lr:g}, scale {self.scale:g}"


@dataclass(frozen=True)
class Run:
    """Everything that decides one run's numbers."""

    variant: Variant
    model: str
    tasks: tuple[str, ...]
    bottleneck: int
    updates: int
    lr: float
    seed: int
    test: bool
    scale: float | None = None  # of the adapters; None: the style's own

    @property
    def numbers(self) -> Numbers:
        """What validation chooses."""
        return Numbers(self.lr, self.scale)

    def path(self, folder: Path) -> Path:
        """Its file."""
        record = asdict(self)
        for name in ("title", "origin", "tuned_as"):
            del record["variant"][name]
        if self.scale is None:
            del record["scale"]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]
        return folder / f"{'test' if self.test else 'tune'}-{self.variant.key}-{self.seed}-{digest}.json"


class Tasks(nn.Module):
    """A backbone with adapters and a classifier a task."""

    def __init__(self, backbone: nn.Module, classes: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Linear(backbone.num_features, count) for count in classes)


def batches(loaders: Loaders) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches without end, every epoch in its own order."""
    for epoch in itertools.count():
        set_epoch(loaders.train, epoch)
        yield from loaders.train


@functools.lru_cache(maxsize=8)
def data(name: str, seed: int) -> DataSplits:
    """A data set, opened once for the runs that follow each other."""
    return open_data(name, seed=seed)


def train(run: Run) -> dict[str, Any]:
    """Trains and measures one run; accuracies in percent by task, and their mean."""
    began = time.perf_counter()
    parts = [data(name, run.seed) for name in run.tasks]
    seed_everything(run.seed + INITIAL_SEED)
    backbone = create_backbone(run.model, 0)
    adapter = dict(run.variant.adapter)
    bottleneck = run.bottleneck * adapter.pop("wide", 1)
    if run.scale is not None:
        adapter["scale"] = run.scale
    mk.inject_adapter(backbone, mk.MoSAConfig(bottleneck=bottleneck, seed=run.seed, **adapter))
    model = Tasks(backbone, [part.num_classes for part in parts])
    loaders = [make_loaders(part, data_config(backbone, None), PER_TASK, seed=run.seed) for part in parts]
    recipe = make_recipe("paper", lr=run.lr, epochs=EPOCHS, batch_size=PER_TASK * len(parts))
    optimizer = make_optimizer(model, recipe, "mosa" if adapter["mode"] == "mosa" else "adamw")
    schedule = Schedule(optimizer, recipe, max(1, run.updates // recipe.epochs))
    experts = torch.arange(len(parts)).repeat_interleave(PER_TASK)
    training_mode(model)
    endless = [batches(each) for each in loaders]
    for update in range(run.updates):
        schedule.set(update)
        images, labels = zip(*(next(each) for each in endless), strict=True)
        loss = objective(
            model, torch.cat(images), labels, experts if run.variant.per_task else None, run.variant.passes
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    accuracies = {}
    for number, (name, each) in enumerate(zip(run.tasks, loaders, strict=True)):
        with mk.inference_experts(model, number if run.variant.per_task else None):
            found = predict(
                nn.Sequential(model.backbone, model.heads[number]), each.test if run.test else each.validation
            )
        accuracies[name] = found.accuracy
    return {
        "variant": run.variant.key,
        "lr": run.lr,
        "scale": run.scale,
        "seed": run.seed,
        "on": "test" if run.test else "validation",
        "accuracies": {**accuracies, MEAN: statistics.fmean(accuracies.values())},
        "stored": stored(model),
        "seconds": time.perf_counter() - began,
        "data": [part.summary() for part in parts],
        "machine": machine(),
        "versions": versions(),
    }


def objective(model: Tasks, images: Tensor, labels: Sequence[Tensor], experts: Tensor | None, passes: int) -> Tensor:
    """Cross-entropy, of two passes with half their symmetric KL divergence; the mean over the first tasks, a scalar."""
    heads = model.heads[: len(labels)]
    sizes = [len(each) for each in labels]
    chosen = contextlib.nullcontext() if experts is None else mk.experts_per_sample(model, experts)
    losses = []
    with chosen:
        if passes == 1:
            for head, own, label in zip(heads, model.backbone(images).split(sizes), labels, strict=True):
                losses.append(CRITERION(head(own), label))
        else:
            both = mk.two_pass(model.backbone, images, features=False)
            pairs = zip(both.logits1.split(sizes), both.logits2.split(sizes), strict=True)
            for head, (first, second), label in zip(heads, pairs, labels, strict=True):
                losses.append(CRITERION(replace(both, logits1=head(first), logits2=head(second)), label))
    return torch.stack(losses).mean()


def stored(model: Tasks) -> int:
    """Numbers to keep for all tasks together, classifiers left out."""
    return sum(parameter.numel() for parameter in model.backbone.parameters() if parameter.requires_grad)


def keep(run: Run, folder: Path) -> dict[str, Any]:
    """Runs and writes the file, complete or not at all; what is there is only read."""
    path = run.path(folder)
    if not path.is_file():
        write_json(path, train(run))
    return read_json(path)


def do_all(runs: Sequence[Run], folder: Path, workers: int, console: Console) -> list[dict[str, Any]]:
    """The results of all runs, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not run.path(folder).is_file()]

    done = itertools.count(1)

    def tell(run: Run, result: Mapping[str, Any]) -> None:
        console.print(
            f"{next(done)}/{len(missing)} {run.variant.key} lr {run.numbers} seed {run.seed}: "
            f"{result['accuracies'][MEAN]:.2f} % on {result['on']} ({result['seconds']:.0f} s)",
            highlight=False,
        )

    run_side_by_side(missing, functools.partial(keep, folder=folder), workers, tell)
    return [keep(run, folder) for run in runs]


def difference(
    title: str, other: str, left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]
) -> Difference:
    """Two variants, seed by seed."""
    points = tuple(a[MEAN] - b[MEAN] for a, b in zip(left, right, strict=True))
    every = [a[name] - b[name] for a, b in zip(left, right, strict=True) for name in a if name != MEAN]
    return Difference(title, other, False, None, points, paired_t(points), signed_rank(every), len(every))


def draw(rows: Sequence[tuple[Variant, Sequence[float]]], title: str, path: Path) -> None:
    """The means with their spread, and every seed."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (variant, values) in enumerate(rows):
        mean = statistics.fmean(values)
        axes.barh(place, mean, xerr=spread(values), color=COLOURS[variant.origin], height=0.7, capsize=3)
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    lowest = min(value for _, values in rows for value in values)
    axes.set_xlim(max(0.0, lowest - 5), None)
    axes.set_yticks(range(len(rows)), [variant.title for variant, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %: mean over tasks, ± over seeds (axis cut)")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def selected(keys: Sequence[str] | None, tasks: int) -> tuple[Variant, ...]:
    """The variants to compare: those of some keys, and ours; None: all.

    Raises:
        BadParameter: a key is unknown.
    """
    known = variants(tasks)
    unknown = sorted(set(keys or ()) - {each.key for each in known})
    if unknown:
        names = ", ".join(each.key for each in known)
        raise typer.BadParameter(f"expected some of {names}, got {', '.join(unknown)}", param_hint="--variant")
    return tuple(each for each in known if keys is None or each.key in {*keys, OURS})


@dataclass(frozen=True)
class Comparison:
    """What is run, and where.

    Attributes:
        compared: the variants.
        base: a run whose variant, learning rate, seed and split are still to be set.
        rates, scales: what to choose from.
        seeds, tuning_seeds: of the tests, and of the runs that choose.
        command: what repeats it.
    """

    compared: tuple[Variant, ...]
    base: Run
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    scales: tuple[float | None, ...] = (None,)
    command: str = ""

    def tuning(self) -> list[Run]:
        """The runs that choose."""
        own = [variant for variant in self.compared if variant.key == self._chooser(variant)]
        grid = itertools.product(own, self.rates, self.scales, self.tuning_seeds)
        return [replace(self.base, variant=variant, lr=lr, scale=scale, seed=seed) for variant, lr, scale, seed in grid]

    def tests(self, chosen: Mapping[str, Numbers]) -> list[Run]:
        """The runs that are reported."""
        grid = itertools.product(self.compared, self.seeds)
        return [
            replace(self.base, variant=variant, **chosen[self._chooser(variant)]._asdict(), seed=seed, test=True)
            for variant, seed in grid
        ]

    def _chooser(self, variant: Variant) -> str:
        return variant.tuned_as or variant.key

    @property
    def title(self) -> str:
        run = self.base
        return (
            f"{len(run.tasks)} tasks in one adapter: {run.model}, r = {run.bottleneck}, {run.updates} updates, "
            f"{len(self.seeds)} seed(s)"
        )


Accuracies = dict[str, dict[Numbers, list[float]]]


def accuracies_of(runs: Sequence[Run], results: Sequence[Mapping[str, Any]]) -> Accuracies:
    """By variant and its numbers, the mean over tasks of each seed."""
    found: Accuracies = {}
    for run, result in zip(runs, results, strict=True):
        found.setdefault(run.variant.key, {}).setdefault(run.numbers, []).append(result["accuracies"][MEAN])
    return found


def best(tried: Accuracies) -> dict[str, Numbers]:
    """The numbers of each variant."""
    return {key: max(found, key=lambda numbers: statistics.fmean(found[numbers])) for key, found in tried.items()}


def report(comparison: Comparison, tried: Accuracies, runs: Sequence[Run], results: Sequence[Any], output: Path) -> str:
    """Writes table, picture and record; returns the Markdown."""
    tasks, title = comparison.base.tasks, comparison.title
    by_variant: dict[str, list[Any]] = {variant.key: [] for variant in comparison.compared}
    chosen: dict[str, str] = {}
    for run, result in zip(runs, results, strict=True):
        by_variant[run.variant.key].append(result)
        chosen[run.variant.key] = str(run.numbers)
    measured = {key: [result["accuracies"] for result in found] for key, found in by_variant.items()}
    rows = [("", "stored", "lr", *(name.rpartition(":")[2] for name in tasks), MEAN)]
    for variant in comparison.compared:
        cells = []
        for name in (*tasks, MEAN):
            values = [each[name] for each in measured[variant.key]]
            cells.append(f"{statistics.fmean(values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else ""))
        rows.append((variant.title, f"{by_variant[variant.key][0]['stored']:,}", chosen[variant.key], *cells))
    ours = next(variant for variant in comparison.compared if variant.key == OURS)
    differences = [
        difference(ours.title, other.title, measured[OURS], measured[other.key])
        for other in comparison.compared
        if other != ours
    ]
    spent = sum(result["seconds"] for result in results)
    given = [f"{scale:g}" for scale in comparison.scales if scale is not None]
    scales = f" and the scale of the adapters from {', '.join(given)}" if given else ""
    parts = [
        f"# {title}",
        f"Test accuracy in percent, ± over seeds. {PER_TASK} images of each task an update; learning rates chosen from "
        f"{', '.join(f'{lr:g}' for lr in comparison.rates)}{scales} by the validation accuracy of "
        f"{len(comparison.tuning_seeds)} other seed(s).",
        markdown_table(rows),
        "Seed by seed:",
        "\n".join(f"- {each}" for each in differences),
        f"`{comparison.command}`, {spent:.0f} s of one thread for the tests, {results[0]['machine']}.",
    ]
    markdown = "\n\n".join(parts) + "\n"
    record = {
        "title": title,
        "tasks": tasks,
        "measured": measured,
        "tried": {key: {str(numbers): values for numbers, values in found.items()} for key, found in tried.items()},
        "chosen": chosen,
        "differences": [{**asdict(each), "mean": each.mean, "verdict": each.verdict} for each in differences],
        "command": comparison.command,
        "data": results[0]["data"],
        "machine": results[0]["machine"],
        "versions": results[0]["versions"],
    }
    write_text(output / "multitask.md", markdown)
    write_json(output / "multitask.json", record)
    means = [(variant, [each[MEAN] for each in measured[variant.key]]) for variant in comparison.compared]
    draw(means, title, output / "multitask.png")
    return markdown


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the table, the picture and the runs' files.")],
    model: Annotated[str, typer.Option(help="timm's name of the backbone.")] = OFFLINE_BACKBONE,
    task: Annotated[list[str] | None, typer.Option(help="A data set, as for `mosa-kernels train`; repeat.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only these, by key, and MoSA; repeat.")] = None,
    bottleneck: Annotated[int, typer.Option(help="r of one adapter.", min=1)] = 64,
    updates: Annotated[int, typer.Option(help=f"Each on {PER_TASK} images of every task.", min=EPOCHS)] = 400,
    rate: Annotated[list[float] | None, typer.Option(help="A learning rate to choose from; repeat.")] = None,
    scale: Annotated[list[float] | None, typer.Option(help="Of the adapters, to choose from; repeat.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=TUNING_SEEDS[0])] = 8,
    tuning_seeds: Annotated[int, typer.Option(min=1, max=len(TUNING_SEEDS))] = len(TUNING_SEEDS),
    workers: Annotated[int, typer.Option(help="Processes of one thread each; 1: this one.", min=1)] = 2,
) -> None:
    """Compares ways to keep several tasks in adapters of one backbone."""
    command = command_of("benchmarks/multitask.py", main, locals())
    console = Console()
    began = time.perf_counter()
    tasks, rates = tuple(task or TASKS), tuple(rate or RATES)
    if len(tasks) < 2 or len(set(tasks)) < len(tasks):
        raise typer.BadParameter(f"expected at least two different tasks, got {', '.join(tasks)}", param_hint="--task")
    compared = selected(variant, len(tasks))
    base = Run(compared[0], model, tasks, bottleneck, updates, rates[0], 0, test=False)
    comparison = Comparison(
        compared, base, rates, tuple(range(seeds)), TUNING_SEEDS[:tuning_seeds], tuple(scale or (None,)), command
    )
    tuning = comparison.tuning()
    tried = accuracies_of(tuning, do_all(tuning, output / "cells", workers, console))
    tests = comparison.tests(best(tried))
    results = do_all(tests, output / "cells", workers, console)
    console.print(report(comparison, tried, tests, results, output), highlight=False, markup=False)
    console.print(f"{time.perf_counter() - began:.0f} s; written to {output}/", highlight=False)


if __name__ == "__main__":
    typer.run(main)
