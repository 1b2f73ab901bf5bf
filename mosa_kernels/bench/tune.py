"""The table of the Triton kernels' tile sizes, measured anew on the device at hand.

Each row of `backends/triton/configs.py` holds for padded bottlenecks up to its key. For each, the three kernels are
tuned one after the other, the others keeping what is best so far: every candidate that gives right results is timed
briefly, then the fastest few beside the present choice in turn, with a cold cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from mosa_kernels.backends.choice import available_backends
from mosa_kernels.backends.triton.configs import Config, configs, padded
from mosa_kernels.bench.adapter import Adapter, AdapterCase
from mosa_kernels.bench.case import Prepared, first_line
from mosa_kernels.bench.environment import choose_device
from mosa_kernels.bench.shapes import Axes, Point, points
from mosa_kernels.bench.timing import Timing, in_turn, warm_up

KERNELS = {"forward": "forward", "tokens": "backward", "weights": "backward"}
"""The tuned kernels, and the direction that shows their time."""

ROWS, DTYPES = (64, 128, 256), ("bf16", "fp32")
_TOKENS, _COLUMNS, _WARPS, _STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)
_MOST_ACCUMULATED = 128 * 256  # entries of a program's largest accumulator, beyond which registers spill for sure
_BRIEF_ROUNDS, _FINAL_ROUNDS, _FINALISTS = 5, 31, 3
_SECONDS = 20.0
_LEAST_GAIN = 0.02  # what a new choice has to bring


def grid(bottleneck: int) -> list[Config]:
    """The candidates for a padded bottleneck."""
    every = itertools.starmap(Config, itertools.product(_TOKENS, _COLUMNS, _WARPS, _STAGES))
    return [tiles for tiles in every if tiles.block_t * max(tiles.block_d, bottleneck) <= _MOST_ACCUMULATED]


def spelled(tiles: Config) -> str:
    """As the table has it."""
    return f"Config({', '.join(map(str, tiles))})"


def tuning_points(axes: Axes) -> list[Point]:
    """One point for each row: ViT-B at a large batch unless asked otherwise."""
    filled = replace(axes, bottleneck=axes.bottleneck or ROWS, dtype=axes.dtype or DTYPES)
    return points("full", "cuda", filled)


def list_tuning(axes: Axes) -> str:
    """What `tune` would measure."""
    lines = []
    for point in tuning_points(axes):
        count = len(grid(padded(point.bottleneck)))
        lines.append(f"{_title(point)}: {count} candidates for each of {', '.join(KERNELS)}")
        lines.append("  " + " ".join(map(spelled, grid(padded(point.bottleneck)))))
    return "\n".join(lines)


def tune(axes: Axes, say: Callable[[str], None], device: torch.device | None = None) -> str:
    """Measures, and returns the rows as the table has them, each with its figures.

    Raises:
        ValueError: the Triton backend is not available here.
    """
    answer = available_backends()["triton"]
    if answer is not True:
        raise ValueError(f"tune: expected the Triton backend, which is not available: {answer}")
    device = device or choose_device("cuda")
    warm_up(device)
    lines = [f"# measured on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the interpreter'}"]
    for point in tuning_points(axes):
        say(_title(point))
        lines.append(f"# {_title(point)}")
        lines.append(tune_row(point, device, grid(padded(point.bottleneck)), say))
    lines.append("# tests/backends/triton/test_compile.py says whether rows keep within registers and shared memory")
    return "\n".join(lines)


def tune_row(
    point: Point,
    device: torch.device,
    candidates: Sequence[Config],
    say: Callable[[str], None],
    seconds: float = _SECONDS,
) -> str:
    """The best tiles of each kernel for one row, as a line of the table; `seconds` bound each round of timing."""
    adapter = Adapter(point, device)
    best = _present(point, device)
    remarks = []
    for kernel, direction in KERNELS.items():
        case = adapter.case(direction)
        trials = [_Trial({**best, kernel: tiles}, kernel, case) for tiles in [best[kernel], *candidates]]
        chosen, now, then = _fastest(trials, device, say, seconds)
        best[kernel] = chosen.tiles[kernel]
        remarks.append(f"{kernel} {then.median:.4g} ms (before {now.median:.4g})")
    row = ", ".join(spelled(best[kernel]) for kernel in KERNELS)
    return f"    {padded(point.bottleneck)}: ({row}),  # {', '.join(remarks)}"


class _Trial:
    """One choice of tiles, with the kernels compiled for it: the launcher's own cache does not tell stages apart."""

    def __init__(self, tiles: dict[str, Config], kernel: str, case: AdapterCase) -> None:
        self.tiles, self.kernel, self.case = tiles, kernel, case
        self.compiled: dict[Any, Any] = {}
        self.prepared: Prepared | None = None

    def admitted(self) -> str | None:
        """None if it compiles and is right, else why not."""
        try:
            with self.in_use():
                provider = next(p for p in self.case.providers() if p.name == "triton")
                prepared = provider.prepare()
                verdict = self.case.expected("expert").check(prepared.results())
                prepared.run()
        except Exception as error:  # a candidate that does not compile is no candidate
            return first_line(error)
        if verdict.reason is None:
            self.prepared = prepared
        return verdict.reason

    def run(self) -> None:
        assert self.prepared is not None
        with self.in_use():
            self.prepared.run()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        from mosa_kernels.backends.triton import launch, plan

        table = partial(_chosen, plan.configs, self.tiles)
        with patch.object(plan, "configs", table), patch.object(launch, "_compiled", self.compiled):
            yield


def _fastest(
    trials: Sequence[_Trial], device: torch.device, say: Callable[[str], None], seconds: float
) -> tuple[_Trial, Timing, Timing]:
    """The best trial, and the times of the first one, which is the present choice, and of the best."""
    right: list[_Trial] = []
    for trial in trials:
        reason = trial.admitted()
        if reason is None:
            right.append(trial)
        else:
            say(f"  {trial.kernel} {spelled(trial.tiles[trial.kernel])}: {reason}")
    if not right or right[0] is not trials[0]:
        raise ValueError(f"tune: the present choice {trials[0].tiles} does not run")
    brief = _timed(right, device, _BRIEF_ROUNDS, seconds)
    order = sorted(range(1, len(right)), key=lambda n: brief[n].median)[:_FINALISTS]
    finalists = [right[0], *(right[n] for n in order)]
    final = _timed(finalists, device, _FINAL_ROUNDS, seconds)
    for trial, timing in zip(finalists, final, strict=True):
        say(f"  {trial.kernel} {spelled(trial.tiles[trial.kernel])}: {timing.median:.4g} ms")
    best = min(range(len(finalists)), key=lambda n: final[n].median)
    if final[best].median > (1 - _LEAST_GAIN) * final[0].median:
        best = 0
    return finalists[best], final[0], final[best]


def _timed(trials: Iterable[_Trial], device: torch.device, rounds: int, seconds: float) -> list[Timing]:
    calls = {str(number): trial.run for number, trial in enumerate(trials)}
    times = in_turn(calls, device, rounds=rounds, seconds=seconds, cold=device.type == "cuda")
    return list(times.values())


def _chosen(table: Callable[..., Any], tiles: dict[str, Config], width: int, *rest: Any, **options: Any) -> Any:
    """The table's answer with these tiles in it."""
    columns = padded(width)
    chosen = {name: t._replace(block_d=min(t.block_d, columns)) for name, t in tiles.items()}
    return table(width, *rest, **options)._replace(**chosen)


def _present(point: Point, device: torch.device) -> dict[str, Config]:
    from mosa_kernels.backends.triton.plan import architecture

    row = configs(point.width, point.bottleneck, point.torch_dtype, architecture(device))
    return {name: getattr(row, name) for name in KERNELS}


def _title(point: Point) -> str:
    table = "_FLOAT32" if point.dtype == "fp32" else "half precision"
    return f"{table}, d {point.width}, r {point.bottleneck}, {point.dtype}, {point.tokens} tokens"
