"""The error gate of one backend in a process of its own: what crashes or hangs there leaves the rest of us alone.

The process answers cell by cell, so it is known which one it was in when it ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from mosa_kernels.backends.measured import REFERENCE, SIZES
from mosa_kernels.bench.adapter import Adapter, AdapterCase
from mosa_kernels.bench.alignment import AlignmentCase
from mosa_kernels.bench.case import EAGER, Case, Provider
from mosa_kernels.bench.consistency import ConsistencyCase
from mosa_kernels.bench.kernels import admit
from mosa_kernels.bench.masked_adamw import MaskedAdamWCase
from mosa_kernels.bench.merge import MergeCase
from mosa_kernels.bench.shapes import Point
from mosa_kernels.bench.split import SplitCase

_DIRECTIONS = {"adapter_forward": "forward", "adapter": "both"}
SECONDS = 300.0
"""For all cells of a process, where no deadline leaves less."""

_MOST_DEATHS = 3
_LOST = 9  # exit status of a process whose device takes no calls any more
_LOST_DEVICE = "it left the device unusable"
_OUT_OF_TIME = "it was not done"


class Cell(NamedTuple):
    """One call to measure."""

    operator: str  # a key of SIZES
    point: Point
    classes: int = 0  # of the consistency loss

    @property
    def dtype(self) -> str:
        return "uint8" if self.operator == "split" else str(self.point.torch_dtype).removeprefix("torch.")

    @property
    def sizes(self) -> dict[str, int]:
        """As the operator's `kind` finds them in the call."""
        point = self.point
        area = point.width * point.bottleneck
        values: tuple[int, ...] = {
            "merge": (point.width, point.bottleneck, point.layers),
            "masked_adamw": (2 * point.layers, 2 * point.layers * area),
            "feature_alignment": (point.layers, point.tokens * point.width),
            "consistency": (self.classes, point.images),
            "split": (area,),
        }.get(self.operator, (point.width, point.bottleneck, point.tokens))
        return dict(zip(SIZES[self.operator], values, strict=True))

    @property
    def name(self) -> str:
        return ", ".join([self.operator, self.dtype, *(f"{name} {size}" for name, size in self.sizes.items())])


def with_cases(cells: Sequence[Cell], device: torch.device) -> Iterator[tuple[Cell, Case]]:
    """Each cell with its tensors. Both directions of one point, in a row, share them."""
    adapter: Adapter | None = None
    for cell in cells:
        point = cell.point
        if cell.operator not in _DIRECTIONS:
            adapter = None
        elif adapter is None or adapter.point != point:
            adapter = None  # before the next one takes memory
            adapter = Adapter(point, device)
        yield cell, _case(cell, adapter, device)


def _case(cell: Cell, adapter: Adapter | None, device: torch.device) -> Case:
    point = cell.point
    if adapter is not None:
        return adapter.case(_DIRECTIONS[cell.operator])
    if cell.operator == "merge":
        return MergeCase(point, device)
    if cell.operator == "masked_adamw":
        return MaskedAdamWCase(point, device)
    if cell.operator == "feature_alignment":
        return AlignmentCase(point, device)
    return SplitCase(point, device) if cell.operator == "split" else ConsistencyCase(point, cell.classes, device)


def provider_of(case: Case, backend: str) -> Provider:
    """The case's provider that runs a backend; "reference" is the definition."""
    if isinstance(case, AdapterCase) and backend == REFERENCE:
        return case.by_backend(EAGER, backend)
    name = EAGER if backend == REFERENCE else backend
    return next(provider for provider in case.providers() if provider.name == name)


def is_lost(device: torch.device) -> bool:
    """Whether a device takes no calls any more, as a GPU in this process after an access outside its memory."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


def gate_apart(backend: str, cells: Sequence[Cell], device: torch.device, seconds: float = SECONDS) -> list[str | None]:
    """For each cell None, if the backend is right there, or the reason why it may not run.

    After a cell that ends the process, another one goes on with the next, a few times, all within `seconds`.
    """
    reasons: list[str | None] = []
    until = time.monotonic() + seconds
    for _ in range(_MOST_DEATHS):
        answers, ended = _ask(backend, cells[len(reasons) :], device, max(1.0, until - time.monotonic()))
        reasons += answers
        if ended == _OUT_OF_TIME:
            ended += f" when the {seconds:g} s for all calls were over"
        if len(reasons) < len(cells) and ended != _LOST_DEVICE:
            reasons.append(ended or "its process gave no answer")
        if len(reasons) == len(cells):
            return reasons
        if time.monotonic() > until:
            break
    return reasons + [f"not tried, after others ended their processes, such as: {reasons[-1]}"] * (
        len(cells) - len(reasons)
    )


def _ask(
    backend: str, cells: Sequence[Cell], device: torch.device, seconds: float
) -> tuple[list[str | None], str | None]:
    """The answers of one process, and how it ended; None: in good order."""
    with TemporaryDirectory() as folder:
        answers = Path(folder) / "answers"
        answers.touch()
        request = {
            "backend": backend,
            "cells": cells,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "answers": str(answers),
        }
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = (sys.executable, "-c", f"from {__name__} import answer; answer()")
        try:
            done = subprocess.run(
                command,
                input=json.dumps(request),
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
            if done.returncode == -signal.SIGINT:
                raise KeyboardInterrupt
            last = (done.stderr.strip().splitlines() or [""])[-1][:300]
            known = {0: None, _LOST: _LOST_DEVICE}
            ended = known.get(done.returncode, f"its process ended with {done.returncode}: {last}")
        except subprocess.TimeoutExpired:
            ended = _OUT_OF_TIME
        return [json.loads(line) for line in answers.read_text().splitlines()], ended


def answer() -> None:
    """The process: reads what to check from stdin, and writes a line of JSON, null or a reason, for each cell."""
    request: dict[str, Any] = json.load(sys.stdin)
    device = torch.device(request["device"])
    torch.set_num_threads(request["threads"])
    cells = [Cell(operator, Point(*point), classes) for operator, point, classes in request["cells"]]
    with open(request["answers"], "a", buffering=1) as answers:
        for _, case in with_cases(cells, device):
            row: dict[str, Any] = {}
            admit(case, provider_of(case, request["backend"]), row)
            lost = is_lost(device)
            reason = row["reason"] or (_LOST_DEVICE if lost else None)
            answers.write(json.dumps(reason) + "\n")
            if lost:
                os._exit(_LOST)
