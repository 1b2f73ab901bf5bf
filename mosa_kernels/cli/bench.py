"""`mosa-kernels bench`: how fast this machine runs the kernels and whole models, and whether they are still right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import nan
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mosa_kernels.backends import measured
from mosa_kernels.backends.measured import REFERENCE
from mosa_kernels.bench.choose import BACKENDS, DeviceLostError, choose
from mosa_kernels.bench.commits import measure_commits
from mosa_kernels.bench.compare import broken, compare, markdown, regressions, same_device
from mosa_kernels.bench.goals import answers
from mosa_kernels.bench.kernels import PROVIDERS
from mosa_kernels.bench.plots import PICTURES
from mosa_kernels.bench.records import Record, failures, losses, timings
from mosa_kernels.bench.report import disturbed_lines
from mosa_kernels.bench.run import JSON, MARKDOWN, PARTS, UNFINISHED, Request, Say, find, measure, read, write
from mosa_kernels.bench.shapes import BOTTLENECKS, DTYPES, EXPERT_PER, MODELS, PRESETS, Axes
from mosa_kernels.bench.tune import list_tuning, tune
from mosa_kernels.cli.errors import MendableError, plain_errors
from mosa_kernels.train.folder import require_own_or_new, require_writable, write_json, write_text

_KERNELS, _WHICH = "Shapes of the kernels", "What to measure"
_TABLE_WIDTH = 120
_OUTPUT = Path("mosa-bench")


def bench(
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for report.json, report.md and pictures (mosa-bench); with --choose its file."),
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}: seconds, minutes, or an hour.", rich_help_panel=_WHICH)
    ] = "quick",
    only: Annotated[str | None, typer.Option(help=f"Some of {', '.join(PARTS)}.", rich_help_panel=_WHICH)] = None,
    providers: Annotated[
        str | None, typer.Option(help=f"Some of {', '.join(PROVIDERS)}.", rich_help_panel=_WHICH)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; by default PyTorch's.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Times that each provider is timed.")] = None,
    deadline: Annotated[int | None, typer.Option(help="Seconds after which nothing new is begun.")] = None,
    processor_time: Annotated[
        bool, typer.Option("--processor-time", help="On a CPU: one thread, its time on the processor.")
    ] = False,
    shapes: Annotated[str | None, typer.Option(help=f"Some of {', '.join(MODELS)}.", rich_help_panel=_KERNELS)] = None,
    images: Annotated[str | None, typer.Option(help="Images of a call.", rich_help_panel=_KERNELS)] = None,
    bottlenecks: Annotated[
        str | None, typer.Option(help=f"r, such as {', '.join(map(str, BOTTLENECKS))}.", rich_help_panel=_KERNELS)
    ] = None,
    experts: Annotated[str | None, typer.Option(help="N, such as 1, 2, 4, 8.", rich_help_panel=_KERNELS)] = None,
    dtypes: Annotated[str | None, typer.Option(help=f"Some of {', '.join(DTYPES)}.", rich_help_panel=_KERNELS)] = None,
    expert_per: Annotated[
        str | None, typer.Option(help=f"Some of {', '.join(EXPERT_PER)}.", rich_help_panel=_KERNELS)
    ] = None,
    models: Annotated[str | None, typer.Option(help="timm models for the part model.", rich_help_panel=_WHICH)] = None,
    batch: Annotated[int | None, typer.Option(help="Images of a pass, for the part model.")] = None,
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            help="Two reports, or two commits of the clone in this folder, which are built and measured.",
            metavar="A B",
        ),
    ] = None,
    tuning: Annotated[
        bool, typer.Option("--tune", help="Measure the table of the Triton kernels' tile sizes anew and print it.")
    ] = False,
    choosing: Annotated[
        bool,
        typer.Option(
            "--choose",
            help="Measure which backend is the fastest for which call on this device, and use that from now on: "
            "minutes, and a table in the user's cache (or --output, a .json file or a folder).",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --tune: list what would be measured.")] = False,
) -> None:
    """Measure kernels and whole models on this machine; a report with tables and pictures. Lists take commas.

    Exits with 1 where a kernel is wrong or, with --compare, where something became slower, wrong or broke or devices
    differ.
    """
    console = Console(soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(line, style="dim")

    with plain_errors():
        request = Request(
            preset,
            _words("only", only),
            device,
            Axes(
                _words("shapes", shapes),
                _numbers("images", images),
                _numbers("bottlenecks", bottlenecks),
                _numbers("experts", experts),
                _words("dtypes", dtypes),
                _words("expert-per", expert_per),
            ),
            _words("models", models),
            batch,
            threads,
            rounds,
            _words("providers", providers),
            processor_time,
            deadline,
        )
        asked = [name for name, is_so in (("tune", tuning), ("choose", choosing), ("compare", against)) if is_so]
        if len(asked) > 1:
            raise ValueError(f"{', '.join(asked)}: expected one of them, got {'both' if len(asked) == 2 else 'all'}")
        if tuning:
            _refuse_without_effect_on_tuning(request, output)
            console.print(list_tuning(request.axes) if dry_run else tune(request.axes, say), markup=False)
            return
        if dry_run:
            raise ValueError("dry-run: expected together with --tune")
        if against is None or output is not None:
            _refuse_unwritable(output, choosing)
        if against is None and not choosing:
            _refuse_files_of_others(output or _OUTPUT)
        if choosing:
            _choose(request, output, console, say)
            return
        if against is not None:
            bad = _compare(against, request, console, output)
            raise typer.Exit(1 if bad else 0)
        output = _OUTPUT if output is None else output
        with _telling_what_is_kept(output, console) as keep:
            report = measure(request, say, keep)
            paths = write(report, output)
        _conclude(report, console)
        console.print(f"{report['seconds']:.0f} s; wrote {', '.join(map(str, paths))}")
        if failures(report):
            raise typer.Exit(1)
        if not report["left_out"] and not any("ms" in row for _, row in timings(report)):
            reasons = Counter(f"{provider}: {row['reason']}" for (*_, provider), row in timings(report))
            raise MendableError("nothing was measured; " + ("; ".join(reasons) or "no case was left to run"))


def _words(name: str, text: str | None) -> tuple[str, ...] | None:
    words = None if text is None else tuple(word.strip() for word in text.split(",") if word.strip())
    if words == ():
        raise ValueError(f"{name}: expected at least one value, got {text!r}")
    return words


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    words = _words(name, text)
    try:
        return None if words is None else tuple(map(int, words))
    except ValueError as error:
        raise ValueError(f"{name}: expected whole numbers with commas, got {text!r}") from error


def _refuse_without_effect_on_tuning(request: Request, output: Path | None) -> None:
    usual = Request(device=request.device, axes=request.axes)
    given = [name for name, value in vars(request).items() if value != getattr(usual, name)]
    if output is not None:
        given.append("output")
    if given:
        raise ValueError(f"{', '.join(given)}: expected without --tune, which takes the shapes of kernels alone")


def _refuse_unwritable(output: Path | None, choosing: bool = False) -> None:
    """Where nothing could be written in the end, nothing is measured."""
    if choosing and output is not None and output.suffix == ".json":
        require_writable(output)
    else:
        require_writable(output or (measured.user_folder() if choosing else _OUTPUT), folder=True)


def _refuse_files_of_others(folder: Path) -> None:
    for names in ((*PICTURES, MARKDOWN, JSON), (UNFINISHED,)):
        files = [folder / name for name in names]
        require_own_or_new(files, lambda record: {"preset", "limits"} <= record.keys(), "a report of bench")


@contextmanager
def _telling_what_is_kept(folder: Path, console: Console) -> Iterator[Callable[[Record], None]]:
    """Gives what writes an unfinished report, and says where that is when the work within ends early."""
    kept = False

    def keep(unfinished: Record) -> None:
        nonlocal kept
        write_json(folder / UNFINISHED, unfinished)
        kept = True

    try:
        yield keep
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if kept or stopped:
            what = f"what was measured until then is in {folder / UNFINISHED}" if kept else "nothing was measured yet"
            console.print(f"\n{'Stopped' if stopped else 'Ended early'}; {what}.", markup=False)
        if stopped:
            raise typer.Exit(130) from None
        raise


def _choose(request: Request, output: Path | None, console: Console, say: Say) -> None:
    try:
        record, file = choose(request, output, say)
    except DeviceLostError as error:
        raise MendableError(str(error)) from error
    measured.forget()
    backends = [REFERENCE, *BACKENDS[record["device_type"]]]
    table = Table("operator", "dtype", "sizes", *(f"{name}, ms" for name in backends), "runs", box=None)
    for cell in record["cells"]:
        sizes = ", ".join(f"{name} {size}" for name, size in cell["sizes"].items())
        times = [f"{cell['ms'][name]:.3g}" if name in cell["ms"] else "-" for name in backends]
        runs = f"[yellow]{REFERENCE}[/yellow]"
        if cell["backend"] != REFERENCE:
            gain = cell["ms"].get(REFERENCE, nan) / cell["ms"][cell["backend"]]
            runs = f"[green]{cell['backend']}[/green], {gain:.2f} times as fast"
        table.add_row(cell["operator"], cell["dtype"], sizes, *times, runs)
    Console(width=max(_TABLE_WIDTH, console.width), highlight=False).print(table)
    for name, reason in record["unavailable"].items():
        console.print(f"{name} is not available: {reason}", markup=False)
    left_out = [(name, why) for cell in record["cells"] for name, why in cell["left_out"].items()]
    for (name, reason), count in Counter(left_out).items():
        console.print(f"[yellow]{name} is left out of {count} call(s)[/yellow]: {escape(reason)}")
    if record["not_measured"]:
        console.print(f"{len(record['not_measured'])} call(s) were left out for lack of time", style="yellow")
    disturbed = sum(cell["disturbed"] for cell in record["cells"])
    if disturbed:
        console.print(
            f"[yellow]{disturbed} call(s) took now more, now less time: the machine had other work, and the choice may "
            "be wrong there. Measure again when it has none.[/yellow]"
        )
    console.print(f"{record['seconds']:.0f} s; wrote {file}", markup=False)
    if output is not None:
        console.print(f"Used once it lies in {measured.user_folder()}", style="dim")


def _conclude(report: Record, console: Console) -> None:
    """What a reader should not miss."""
    for answer in answers(report):
        colour = {"met": "green", "missed": "yellow"}.get(answer.verdict, "dim")
        console.print(
            f"[{colour}]{answer.verdict}[/{colour}] {answer.case}, {answer.backend}: {answer.goal.name} {answer.shown}"
        )
    for line in losses(report):
        console.print(f"[yellow]slower[/yellow] {line}")
    for line in disturbed_lines(report):
        console.print(f"[yellow]{line}[/yellow]")
    for line in failures(report):
        console.print(f"[red]wrong[/red] {line}")


def _compare(names: tuple[str, str], request: Request, console: Console, output: Path | None) -> bool:
    """Whether something is worse, or nothing can be said. Both names are reports, or both are commits."""
    paths = [Path(name) for name in names]
    there = [find(path) is not None for path in paths]
    if any(there) and request != Request():
        raise ValueError(f"compare: expected with --output alone where {names[0]} and {names[1]} are reports")
    if any(there) and not all(there):
        report, other = names if there[0] else names[::-1]
        raise ValueError(
            f"compare: expected two reports or two commits, got the report {report} and {other}, no report"
        )
    if any(there):
        reports = [read(path) for path in paths]
    else:
        _refuse_unwritable(output)
        reports = measure_commits(names, request.arguments(), Path.cwd(), lambda line: console.print(line, style="dim"))
    differences = compare(reports[0], reports[1])
    text = markdown(reports[0], reports[1], names, differences)
    console.print(text, markup=False)
    if not any(there) or output is not None:
        write_text((output or _OUTPUT) / "compare.md", text)
    comparable = same_device(*reports)
    return not comparable or bool(regressions(differences) or broken(*reports))
