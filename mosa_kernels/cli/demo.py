"""`mosa-kernels demo`: MoSA and its baselines on real handwritten digits, in minutes on a laptop."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mosa_kernels._machine import available_cores, machine
from mosa_kernels.cli.errors import MendableError, plain_errors
from mosa_kernels.cli.tables import table_of
from mosa_kernels.train.comparison import (
    CHOSEN,
    CONTENDERS,
    DEMO,
    MODEL,
    Outcome,
    chosen_numbers,
    demo_settings,
    demo_splits,
)
from mosa_kernels.train.comparison_figure import draw_comparison
from mosa_kernels.train.comparison_report import (
    markdown_table,
    rows_of_mechanisms,
    rows_of_methods,
    summarise,
    verdict,
)
from mosa_kernels.train.comparison_runs import Step, Task, run_tasks
from mosa_kernels.train.folder import require_own_or_new, require_writable, versions, write_json, write_text

SEEDS = (30, 31, 32)  # those before were looked at when what is compared was decided
QUICK_EPOCHS = 3
KEPT = "mosa-rising"  # whose adapter and merged weights of the first seed are written


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("mosa-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of one seed: not the real figures.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes, each with one thread; by default one a core, at most 6.", min=1)
    ] = None,
) -> None:
    """Fine-tune a small vision transformer on real digits in minutes and compare MoSA with its baselines."""
    console = Console()
    with plain_errors():
        require_writable(output, folder=True)
        files = [output / f"demo.{kind}" for kind in ("png", "md", "json")]
        require_own_or_new(files, lambda record: {"verdict", "methods", "runs"} <= record.keys(), "a demo's")
        began = time.perf_counter()
        seeds, epochs = (SEEDS[:1], QUICK_EPOCHS) if quick else (SEEDS, None)
        tasks = make_tasks(seeds, epochs, output)
        processes = workers or min(available_cores(), 6, len(tasks))
        splits = demo_splits(seeds[0])
        console.print(
            f"[bold]MoSA on handwritten digits[/bold]: {MODEL}, {len(splits.train)} training images (20 labels a "
            f"class), {len(splits.test)} test images, {len(tasks)} runs on {processes} core(s). Learning rates, "
            f"scales and dropout were chosen beforehand on validation data of other seeds ({CHOSEN.name})."
        )
        outcomes = watch(tasks, processes, console)
        seconds = time.perf_counter() - began
        record = report(outcomes, splits_summary=splits.summary(), seconds=seconds, processes=processes, quick=quick)
        note = f"{MODEL}, {len(seeds)} seed(s), {outcomes[0].rows[-1]['epoch']} epochs" + (" — QUICK" if quick else "")
        picture, text, figures = files
        write_json(figures, record)
        write_text(text, record["markdown"])
        draw_comparison(summarise(outcomes), outcomes, splits, picture, note)
        show(record, console)
        console.print(f"{seconds:.0f} s; picture, figures and weights are in {output}/", highlight=False)
        if not all(outcome.merge["unchanged"] for outcome in outcomes if outcome.merge is not None):
            raise typer.Exit(1)


def make_tasks(seeds: tuple[int, ...], epochs: int | None, output: Path) -> list[Task]:
    """Every contender at every seed, with the numbers that were chosen for it."""
    numbers = chosen_numbers()
    return [
        Task(
            contender,
            demo_settings(contender, numbers[contender.key], seed, epochs),
            test=True,
            keep_in=str(output / "mosa") if contender.key == KEPT and seed == seeds[0] else None,
        )
        for seed in seeds
        for contender in CONTENDERS
    ]


def watch(tasks: list[Task], processes: int, console: Console) -> list[Outcome]:
    """Runs the tasks and shows bars on a terminal, a line a run elsewhere."""
    overall = Progress(
        TextColumn("{task.description:<44}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    bars: dict[int, TaskID] = {}
    done = 0

    def name(number: int) -> str:
        return f"{tasks[number].contender.title}, seed {tasks[number].settings.data_seed}"

    def on_step(step: Step) -> None:
        if step.task not in bars:
            bars[step.task] = overall.add_task(name(step.task), total=step.updates, state="")
        if step.update:
            state = f"loss {step.loss:6.3f}  accuracy {step.accuracy:5.1f} %  {step.images_per_second:4.0f} images/s"
            overall.update(bars[step.task], completed=step.update, state=state)

    def on_done(number: int, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if number in bars:
            overall.remove_task(bars[number])
        overall.update(total, completed=done, state=f"{done} of {len(tasks)} runs")
        overall.console.print(
            f"{name(number)}: test {outcome.accuracy:.1f} %, NLL {outcome.nll:.2f}, {outcome.seconds:.1f} s",
            highlight=False,
        )

    with overall:
        total = overall.add_task("all runs", total=len(tasks), state="")
        try:
            return run_tasks(tasks, processes, on_step, on_done)
        except BrokenProcessPool as error:
            raise MendableError(
                "a run's process was ended from outside, perhaps for lack of memory; try --workers 1"
            ) from error


def report(
    outcomes: list[Outcome], *, splits_summary: dict[str, Any], seconds: float, processes: int, quick: bool
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON, with its Markdown."""
    summaries = summarise(outcomes)
    sentence = verdict(summaries)
    methods, mechanisms = rows_of_methods(summaries), rows_of_mechanisms(summaries)
    merges = [outcome.merge for outcome in outcomes if outcome.merge is not None]
    largest = max(merge["largest_difference"] for merge in merges)
    same, images = (sum(merge[key] for merge in merges) for key in ("same_predictions", "images"))
    finding = "merging changed nothing" if all(merge["unchanged"] for merge in merges) else "MERGING CHANGED A MODEL"
    merging = (
        f"Merging {len(merges)} MoSA models: largest logit difference {largest:.1e}, {same:,} of {images:,} "
        f"predictions identical: {finding}."
    )
    warning = "QUICK: a few steps of one seed, to see that everything works. These are not the real figures.\n\n"
    parts = [markdown_table(methods), markdown_table(mechanisms), sentence, merging]
    markdown = (warning if quick else "") + "\n\n".join(parts) + "\n"
    chosen = json.loads(CHOSEN.read_text())
    return {
        "quick": quick,
        "verdict": sentence,
        "merging": merging,
        "methods": {summary.contender.key: summary.as_dict() for summary in summaries},
        "runs": [
            {"method": o.contender.key, **{k: v for k, v in dataclasses.asdict(o).items() if k != "contender"}}
            for o in outcomes
        ],
        "seeds": sorted({outcome.seed for outcome in outcomes}),
        "recipe": DEMO.as_dict(),
        "chosen": chosen["chosen"],
        "chosen_on": chosen["protocol"],
        "selection": "weights of the last epoch; numbers chosen beforehand on validation data; each run tests once",
        "history": chosen["history"],
        "data": splits_summary,
        "seconds": seconds,
        "processes": processes,
        "machine": machine(),
        "versions": versions(),
        "markdown": markdown,
        "tables": [methods, mechanisms],
    }


def show(record: dict[str, Any], console: Console) -> None:
    """The tables, and what they say."""
    titles = (f"test accuracy and likelihood over seeds {record['seeds']}", "the same MoSA weights, used differently")
    for title, (head, *body) in zip(titles, record["tables"], strict=True):
        console.print(table_of(head, body, title))
    console.print(record["merging"], highlight=False)
    console.print(f"[bold]{record['verdict']}[/bold]", highlight=False)
    if record["quick"]:
        console.print("[yellow]--quick: a few steps of one seed; these are not the real figures.[/yellow]")
