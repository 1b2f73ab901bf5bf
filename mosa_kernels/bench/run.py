"""One report: what was asked for, measured, and written as JSON, Markdown and pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mosa_kernels.bench.case import COMPILE, COMPILE_MAX, first_line
from mosa_kernels.bench.environment import KEEPS_MEMORY, choose_device, describe, keep_memory
from mosa_kernels.bench.growth import AXES, growth_points, measure_growth
from mosa_kernels.bench.kernels import OPERATOR_NAMES, PROVIDERS, Effort, cases, fresh_compiler, measure_case
from mosa_kernels.bench.limits import Limits, known_roofline, measure_limits
from mosa_kernels.bench.model import measure_model, settings
from mosa_kernels.bench.model_variants import Setting
from mosa_kernels.bench.plots import PICTURES, draw
from mosa_kernels.bench.records import FORMAT, Record, missing_in, name_of
from mosa_kernels.bench.report import markdown
from mosa_kernels.bench.shapes import OPTIONS, PRESETS, Axes, points
from mosa_kernels.bench.timing import warm_up
from mosa_kernels.train.folder import read_json, write_json, write_text

PARTS = (*OPERATOR_NAMES, "model", "growth")
JSON, MARKDOWN = "report.json", "report.md"
UNFINISHED = "report.unfinished.json"
"""What is measured so far lies here until the report is written: a run that ends early leaves a finished one alone."""

_BY_ADAPTERS = frozenset(OPTIONS.values())
_TAKEN: dict[str, frozenset[str]] = {
    "merge": _BY_ADAPTERS - {"images", "expert-per"},
    "masked_adamw": frozenset({"shapes", "bottlenecks", "experts"}),
    "alignment": frozenset({"shapes", "images", "dtypes"}),
    "model": frozenset({"bottlenecks", "experts", "dtypes", "models", "batch"}),
}
"""The options of shapes that a part heeds; the others heed those of an adapter call."""

_ROUNDS = {"smoke": 3, "quick": 11, "full": 21}
_SECONDS = {"smoke": 0.5, "quick": 15.0, "full": 30.0}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        preset: "smoke" (seconds, to see that everything works), "quick" or "full".
        only: some of `PARTS`; None: all.
        device: "cpu", "cuda" or None for a GPU where there is one.
        axes: shapes in place of the preset's.
        models, batch: timm models in place of the preset's, and images of a pass.
        threads: of the CPU; None leaves PyTorch's.
        rounds: how many times each provider is timed; None: the preset's.
        providers: some of `PROVIDERS`; None: all but what the preset leaves out.
        processor_time: on a CPU, one thread and its time on the processor.
        deadline: seconds after which nothing new is begun; compiling ends at three quarters of it.

    Raises:
        ValueError: an option is out of range.
    """

    preset: str = "quick"
    only: tuple[str, ...] | None = None
    device: str | None = None
    axes: Axes = field(default_factory=Axes)
    models: tuple[str, ...] | None = None
    batch: int | None = None
    threads: int | None = None
    rounds: int | None = None
    providers: tuple[str, ...] | None = None
    processor_time: bool = False
    deadline: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, chosen, known in (("only", self.only, PARTS), ("providers", self.providers, PROVIDERS)):
            for value in chosen or ():
                if value not in known:
                    raise ValueError(f"{name}: expected some of {', '.join(known)}, got {value!r}")
        for name in ("threads", "rounds", "batch", "deadline"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.processor_time and (self.threads or 1) > 1:
            raise ValueError(f"threads: expected without --processor-time, which is of one thread, got {self.threads}")
        self._refuse_what_a_part_does_not_take()

    def _refuse_what_a_part_does_not_take(self) -> None:
        """What would go without any effect."""
        parts = self.only or PARTS
        asked = {option: getattr(self.axes, name) for name, option in OPTIONS.items()}
        for option, value in {**asked, "models": self.models, "batch": self.batch}.items():
            takers = [part for part in PARTS if option in _TAKEN.get(part, _BY_ADAPTERS)]
            if value is not None and not set(parts) & set(takers):
                raise ValueError(f"{option}: expected with {', '.join(takers)}, not with {', '.join(parts)} alone")
        if "growth" in (self.only or ()):
            for option in ("shapes", "expert-per", "dtypes"):
                if len(asked[option] or ()) > 1:
                    raise ValueError(f"{option}: expected one value for the part growth, got {asked[option]}")

    def arguments(self) -> list[str]:
        """The words that ask `mosa-kernels bench` for this."""
        axes = self.axes
        options: dict[str, Any] = {
            "preset": self.preset,
            "only": self.only,
            "providers": self.providers,
            "device": self.device,
            "threads": self.threads,
            "rounds": self.rounds,
            **{option: getattr(axes, name) for name, option in OPTIONS.items()},
            "models": self.models,
            "batch": self.batch,
            "deadline": self.deadline,
        }
        words = ["--processor-time"] if self.processor_time else []
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        return words

    def effort(self, device_type: str) -> Effort:
        modes = (COMPILE, COMPILE_MAX)
        if self.providers is not None:
            compiled = tuple(mode for mode in modes if mode in self.providers)
        elif self.preset == "smoke":
            compiled = ()
        else:
            compiled = modes if device_type == "cuda" else (COMPILE,)
        rounds = self.rounds or _ROUNDS[self.preset]
        until = math.inf if self.deadline is None else time.perf_counter() + 0.75 * self.deadline
        return Effort(rounds, _SECONDS[self.preset], compiled, self.processor_time, self.providers, until)


def measure(request: Request, say: Say = lambda line: None, keep: Callable[[Record], None] = lambda _: None) -> Record:
    """The report, ready for JSON.

    Args:
        say: told what is measured next.
        keep: given the report after each part of it, in case the program is ended from outside.
    """
    began = time.perf_counter()
    device = choose_device(request.device)
    if request.processor_time and device.type != "cpu":
        raise ValueError(f"processor-time: expected with --device cpu, the device is {device.type}")
    if request.processor_time or request.threads is not None:
        torch.set_num_threads(1 if request.processor_time else request.threads or 1)
    allocator = KEEPS_MEMORY if device.type == "cpu" and keep_memory() else None
    torch.manual_seed(0)
    effort = request.effort(device.type)
    models: list[Setting] = []
    if request.only is None or "model" in request.only:
        names = None if request.models is None else list(request.models)
        axes = request.axes
        if request.only is None and axes.dtype is not None:  # fp16 is for kernels: of all parts, models leave it out
            axes = replace(axes, dtype=tuple(name for name in axes.dtype if name != "fp16"))
        models = settings(request.preset, device.type, names, request.batch, axes)
    warm_up(device)
    limits = measure_limits(device, quick=request.preset == "smoke")
    known = known_roofline(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    report: Record = {
        "format": FORMAT,
        "preset": request.preset,
        "complete": False,
        "request": asdict(request),
        "machine": describe(device) | {"allocator": allocator},
        "limits": {**limits._asdict(), "known": None if known is None else known._asdict()},
        **{part: [] for part in ("kernels", "models", "growth", "left_out", "broken")},
    }
    for part, name, make in _pieces(request, models, device, limits, effort):
        if request.deadline is not None and time.perf_counter() - began > request.deadline:
            report["left_out"].append(name)
            continue
        say(name)
        try:
            report[part].append(make())
        except Exception as error:  # memory ran out, say: the rest may still be measured
            report["broken"].append(f"{name}: {first_line(error)}")
        report["seconds"] = time.perf_counter() - began
        keep(report)
    return report | {"complete": True, "seconds": time.perf_counter() - began}


def _pieces(
    request: Request, models: Sequence[Setting], device: torch.device, limits: Limits, effort: Effort
) -> Iterator[tuple[str, str, Callable[[], Record]]]:
    """What the report consists of: the list it goes to, its name, and what measures it."""
    parts = request.only or PARTS
    operators = [part for part in parts if part in OPERATOR_NAMES]
    with fresh_compiler():
        for case in cases(operators, points(request.preset, device.type, request.axes), device, effort):
            name = f"{case.operator}: {name_of(case.key)}"
            yield "kernels", name, partial(measure_case, case, device, limits, effort)
    if "growth" in parts:
        lighter = replace(effort, seconds=effort.seconds / 3)
        if request.providers is None:
            lighter = replace(lighter, compiled=())
        with fresh_compiler():
            for axis, point in growth_points(request.preset, device.type, request.axes):
                name = f"growth with {AXES[axis]}: {name_of(point.key())}"
                yield "growth", name, partial(measure_growth, axis, point, device, limits, lighter)
    for setting in models:
        run = partial(
            measure_model, setting, device, rounds=effort.rounds, seconds=4 * effort.seconds, providers=effort.providers
        )
        yield "models", f"model: {name_of(setting.key())}", run


def write(report: Record, folder: Path) -> list[Path]:
    """Writes report.json, report.md and, with matplotlib, the pictures, and returns their paths.

    Pictures of an earlier report that this one does not have go, and so does the unfinished one.
    """
    write_json(folder / JSON, report)
    try:
        pictures, remark = draw(report, folder), ""
    except ModuleNotFoundError as error:
        pictures, remark = [], f"\nPictures were left out: {error}.\n"
    write_text(folder / MARKDOWN, markdown(report, pictures) + remark)
    for name in (*(name for name in PICTURES if name not in pictures), UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in (JSON, MARKDOWN, *pictures)]


def find(path: Path) -> Path | None:
    """The report that a path is, or the one in a folder: the finished one, else one that ended early; None: none."""
    return next((file for file in (path, path / JSON, path / UNFINISHED) if file.is_file()), None)


def read(path: Path) -> dict[str, Any]:
    """A report, or the one in a folder; see `find`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no report, or of a format that this version does not read.
    """
    path = find(path) or (path / JSON if path.is_dir() else path)
    report = read_json(path)
    if report.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a report of format {FORMAT}, got {report.get('format')!r}")
    if (missing := missing_in(report)) is not None:
        raise ValueError(f"{path}: expected a report with {missing}, got none")
    return report
