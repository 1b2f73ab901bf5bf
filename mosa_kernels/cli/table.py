"""`mosa-kernels table N`: one of the paper's tables as a command."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mosa_kernels._files import expanded
from mosa_kernels.cli.errors import MendableError, plain_errors
from mosa_kernels.cli.tables import table_of
from mosa_kernels.data.files import some
from mosa_kernels.train.backbones import require_checkpoint
from mosa_kernels.train.folder import read_json, require_own_or_new, require_writable, write_json, write_text
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.table_cells import Cell
from mosa_kernels.train.table_figure import draw_by_task, draw_sweep, draw_table
from mosa_kernels.train.table_grid import Grid, all_final_cells, collect, count_cells, made_by
from mosa_kernels.train.table_report import rows_of_table, table_csv, table_markdown, table_record
from mosa_kernels.train.table_runs import missing_cells, run_cells, usual_workers
from mosa_kernels.train.table_sources import Sources, require_same_sources, same_elsewhere
from mosa_kernels.train.table_spec import Changes, Table, of_tasks, read_table, suite_of, table_numbers
from mosa_kernels.train.table_summary import differences_of, summarise_table

QUICK = {"epochs": 2}
PAPERS = tuple(number for number in table_numbers() if not number.startswith("ours"))


def table(
    number: Annotated[str, typer.Argument(help=f"{', '.join(table_numbers())}, or all of the paper's.")],
    output: Annotated[Path, typer.Option(help="Folder of runs and tables; what is done in it is not done again.")],
    fgvc: Annotated[Path | None, typer.Option(help="Folder with CUB_200_2011, nabirds, ... and VPT's lists.")] = None,
    vtab: Annotated[Path | None, typer.Option(help="Folder with the 19 data sets of VTAB-1k and their lists.")] = None,
    gicd: Annotated[Path | None, typer.Option(help="Folder of torchvision's CIFAR-100, Aircraft and Food-101.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of the backbone.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs that are reported, of each row and task.", min=1)] = 3,
    tuning_seeds: Annotated[int, typer.Option(help="Runs that choose, of each candidate.", min=1)] = 4,
    tasks: Annotated[str | None, typer.Option(help="Some of the table's tasks, separated by ';'.")] = None,
    rows: Annotated[str | None, typer.Option(help="Some of its rows, as mosa,adaptformer,dropout.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; by default one a GPU, or one a core.", min=1)] = None,
    loaders: Annotated[int, typer.Option(help="Processes a run that read images.", min=0)] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, fp16.")] = "no",
    epochs: Annotated[int | None, typer.Option(help="Another length of each run.", min=1)] = None,
    augment: Annotated[str | None, typer.Option(help="none, light, paper, official: of every run.")] = None,
    weight_decay: Annotated[
        str | None, typer.Option(help="Of every run; of several, as 0.01,0, validation chooses for each row and task.")
    ] = None,
    one_recipe: Annotated[
        bool, typer.Option("--one-recipe", help="Validation chooses for each row once, by the mean over the tasks.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each run: not the real figures.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say how many runs there are, and run none.")] = False,
) -> None:
    """Run or resume the grid behind a table of the paper, and write it as Markdown, CSV and PNG.

    A suite whose folder is not given is replaced by offline tasks, which need no data and no network.
    """
    console = Console()
    with plain_errors():
        require_writable(output, folder=True)
        roots = {"fgvc": fgvc, "vtab": vtab, "gicd": gicd}
        numbers = PAPERS if number == "all" else (number,)
        check_folders(roots, numbers)
        if quick and epochs is not None and epochs > QUICK["epochs"]:
            raise ValueError(f"quick: expected at most {QUICK['epochs']} epochs beside it, got --epochs {epochs}")
        recipe: dict[str, Any] = {"epochs": epochs} if epochs is not None else dict(QUICK) if quick else {}
        if augment is not None:
            recipe["augment"] = augment
        tune_more = {} if weight_decay is None else {"weight_decay": numbers_of("weight_decay", weight_decay)}
        grids, left_out = [], []
        for wanted in numbers:
            root = roots.get(suite_of(wanted))
            changes = Changes(
                recipe=recipe,
                checkpoint=None if checkpoint is None else str(checkpoint),
                data_root=None if root is None else str(root),
                mixed_precision=mixed_precision,
                workers=loaders,
            )
            try:
                place = None if root is None else str(root)
                found = restrict(read_table(wanted, place, every_task=tasks is not None), tasks, rows)
            except ValueError as error:
                if number != "all":
                    raise
                left_out.append(str(error))
                continue
            found = dataclasses.replace(found, tune_more=tune_more, one_recipe=one_recipe or found.one_recipe)
            grids.append(Grid(found, changes, seeds, tuning_seeds))
        if not grids:
            raise ValueError(f"no table is left: {'; '.join(left_out)}")
        for why in left_out:
            console.print(f"left out: {why}", highlight=False)
        if checkpoint is not None:
            check_one_backbone(grids)
        if one_recipe:
            check_several_tasks(grids)
        processes, cells = workers or usual_workers(), output / "cells"
        chosen = [cell for grid in grids for cell in grid.all_tuning_cells()]
        choosing, testing = count_cells(grids)
        console.print(where_from(grids), highlight=False)
        console.print(
            f"{len(grids)} table(s): {choosing} runs that choose on validation images, at most {testing} that test; "
            f"{processes} process(es); results in {output}/",
            highlight=False,
        )
        if plan:
            left = len(missing_cells(chosen, cells)) - len(same_elsewhere(chosen, cells, Sources()))
            console.print(f"{choosing - left} of the {choosing} are done", highlight=False)
            return
        for grid in grids:
            require_covered(grid, output, quick)
        if checkpoint is not None and missing_cells(chosen, cells):  # what is done needs no weights
            require_checkpoint(checkpoint)
        sources = Sources()
        check_data_of(grids, sources)
        possible = [cell for grid in grids for cell in grid.possible_cells()]
        take_over(same_elsewhere(possible, cells, sources), console)
        require_same_sources(possible, cells, sources, lambda text: console.print(text, highlight=False))
        watch(grids, cells, processes, console)
        facts = {
            "command": shlex.join(["mosa-kernels", *sys.argv[1:]]) if sys.argv[0].endswith("mosa-kernels") else "",
            "processes": processes,
            "quick": quick,
        }
        for grid in grids:
            write_table(grid, output, facts, console)


def restrict(table: Table, tasks: str | None, rows: str | None) -> Table:
    """Some tasks and rows of a table.

    Raises:
        ValueError: a task or row that it has not.
    """
    if tasks is not None:
        table = of_tasks(table, [name.strip() for name in tasks.split(";")])
    if rows is None:
        return table
    known = list(dict.fromkeys(row.variant for row in table.rows))
    wanted = [name.strip() for name in rows.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(
            f"rows: expected some of {', '.join(known)} for table {table.number}, got {', '.join(unknown)}"
        )
    return dataclasses.replace(table, rows=tuple(row for row in table.rows if row.variant in wanted))


def check_folders(roots: Mapping[str, Path | None], numbers: Sequence[str]) -> None:
    """Refuses folders of data that do not exist or that no table wants, rather than run offline tasks unasked.

    Raises:
        ValueError: a folder of another suite than the tables need.
        NotADirectoryError: no such folder.
    """
    needed = {number: suite_of(number) for number in numbers}
    for suite, root in roots.items():
        if root is None:
            continue
        if suite not in needed.values():
            wants = [f"--{name}" if name in roots else "offline tasks only" for name in dict.fromkeys(needed.values())]
            raise ValueError(f"--{suite}: table {', '.join(numbers)} needs {', '.join(wants)}, got --{suite} {root}")
        if not expanded(root).is_dir():
            raise NotADirectoryError(f"--{suite}: expected a folder, got {root}")


def check_one_backbone(grids: Sequence[Grid]) -> None:
    """Refuses to give one file of weights to several backbones.

    Raises:
        ValueError: naming them and their tables.
    """
    tables: dict[str, list[str]] = {}
    for grid in grids:
        tables.setdefault(grid.table.model, []).append(grid.table.number)
    if len(tables) > 1:
        several = "; ".join(f"{model} (table {', '.join(numbers)})" for model, numbers in tables.items())
        raise ValueError(
            f"--checkpoint: expected tables of one backbone, got {several}; give the tables one by one, each with the "
            "weights of its backbone, and the same --output"
        )


def check_several_tasks(grids: Sequence[Grid]) -> None:
    """Refuses one recipe for all tasks where a single task chooses anyway.

    Raises:
        ValueError: naming the tables.
    """
    alone = {grid.table.number: grid.tuning_tasks(grid.table.tasks[0]) for grid in grids}
    named = [f"table {number}, where {tasks[0].name!r} chooses" for number, tasks in alone.items() if len(tasks) == 1]
    if named:
        raise ValueError(f"--one-recipe: expected tables of which several tasks choose, got {'; '.join(named)}")


def numbers_of(name: str, text: str) -> list[float]:
    """The different numbers of "0.01,0", in order.

    Raises:
        ValueError: something else between the commas.
    """
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"{name}: expected numbers separated by commas, got {text!r}") from None


def where_from(grids: Sequence[Grid]) -> str:
    """What stands in for which data, in words."""
    places: dict[str, list[str]] = {}
    for grid in grids:
        offline = "offline tasks in place of the paper's data sets"
        place = offline if grid.table.scale == "offline" else f"the paper's data sets in {grid.changes.data_root}"
        places.setdefault(place, []).append(grid.table.number)
    return "\n".join(f"table {', '.join(numbers)}: {place}" for place, numbers in places.items())


def page_of(grid: Grid, output: Path) -> Path:
    """The files of a table, without their endings."""
    return output / grid.table.name.lower().replace(" ", "-")


def require_covered(grid: Grid, output: Path, quick: bool) -> None:
    """Refuses to write over a table with figures that the coming one lacks, where their runs are not beside it.

    Raises:
        ValueError: naming what would be lost; or the file is no table.
    """
    figures = page_of(grid, output).with_suffix(".json")
    if not figures.exists():
        return
    require_own_or_new((figures,), lambda record: {"table", "rows", "seeds"} <= record.keys(), "a table")
    if (output / "cells").is_dir():
        return
    found = read_json(figures)
    coming = {(row.key, task.name) for row in grid.table.rows for task in grid.table.tasks}
    lost = [
        f"{key}, {task}" for key, row in found["rows"].items() for task in row["tasks"] if (key, task) not in coming
    ]
    if found["seeds"] > grid.seeds:
        lost.append(f"{found['seeds']} seeds")
    if quick and not found.get("quick"):
        lost.append("runs of full length")
    if lost:
        raise ValueError(
            f"output: {figures} holds figures that would be lost ({some(lost)}), for the runs behind them are not in "
            f"{output}; choose another folder"
        )


def check_data_of(grids: list[Grid], sources: Sources) -> None:
    """Opens the paper's data sets before hours are spent on the first of them.

    Raises:
        FileNotFoundError: naming all that is missing.
    """
    wrong: dict[str, None] = {}
    for grid in grids:
        if grid.table.scale == "real":
            for task in grid.table.tasks:
                for data in dict.fromkeys((task.tuning_data, task.data)):
                    try:
                        sources.fingerprint(Settings(grid.table.model, data, data_root=grid.changes.data_root))
                    except (ValueError, FileNotFoundError, RuntimeError) as error:
                        wrong[f"{task.name}: {error}"] = None
    if wrong:
        raise FileNotFoundError("; ".join(wrong))


def take_over(found: Mapping[Path, Path], console: Console) -> None:
    """Gives copies of runs the names under which a table looks for them, see `same_elsewhere`."""
    for wanted, path in found.items():
        write_json(wanted, read_json(path))
    if found:
        console.print(
            f"{len(found)} run(s) of the same data and weights, which lay elsewhere, are taken over: compared were the "
            "names, sizes and labels of the images and the hash of the weights",
            highlight=False,
        )


def watch(grids: list[Grid], folder: Path, processes: int, console: Console) -> None:
    """Runs what is missing behind a bar; a line a run where there is no terminal."""

    def stage(title: str, cells: list[Cell]) -> None:
        todo = missing_cells(cells, folder)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        with bar:
            line = bar.add_task(title, total=len(todo))

            def on_done(cell: Cell, result: dict[str, Any]) -> None:
                bar.advance(line)
                if not console.is_terminal or result.get("failed"):
                    outcome = result.get("failed") or ", ".join(
                        f"{name} {row['accuracy']:.2f}" for name, row in result["measured"].items()
                    )
                    console.print(f"{cell.label}: {outcome} ({result['seconds']:.1f} s)", highlight=False)

            run_cells(todo, folder, processes, on_done)

    try:
        stage("choosing", [cell for grid in grids for cell in grid.all_tuning_cells()])
        stage("testing", [cell for grid in grids for cell in all_final_cells(grid, folder)])
    except BrokenProcessPool as error:
        raise MendableError(
            "a run's process was ended from outside, perhaps for lack of memory; finished runs are kept: give the same "
            "command again, perhaps with --workers 1"
        ) from error
    except KeyboardInterrupt:
        console.print("\nStopped; finished runs are kept. The same command goes on from here.")
        raise typer.Exit(130) from None


def write_table(grid: Grid, output: Path, facts: dict[str, Any], console: Console) -> None:
    """Writes table-N.md, .csv, .png and .json, and shows the table."""
    measured = collect(grid, output / "cells")
    facts = {**facts, **made_by(grid, output / "cells")}
    summaries = summarise_table(grid.table, measured)
    differences = differences_of(grid.table, measured)
    stem = page_of(grid, output)
    write_json(stem.with_suffix(".json"), table_record(grid, measured, differences, facts))
    write_text(stem.with_suffix(".csv"), table_csv(summaries))
    title = (
        f"{grid.table.name}: {grid.table.title} ({grid.table.scale}, {grid.seeds} seed{'s' if grid.seeds > 1 else ''})"
    )
    title += " — QUICK" if facts["quick"] else ""
    if grid.table.by_task:
        draw_by_task(differences, title, stem.with_suffix(".png"))
    elif grid.table.sweep is None:
        draw_table(summaries, title, stem.with_suffix(".png"))
    else:
        draw_sweep(summaries, grid.table.sweep, title, stem.with_suffix(".png"))
    write_text(stem.with_suffix(".md"), table_markdown(grid, measured, summaries, differences, facts))
    head, *body = rows_of_table(summaries)
    console.print(table_of(head, ([cell.replace("**", "") for cell in row] for row in body), title))
    for difference in differences:
        console.print(f"  {difference}", highlight=False)
