"""The table of which backend runs which call, measured on the device at hand; `backends.measured` reads it.

A backend that does not take a call, raises, crashes or fails the error gate has no time there, but a reason.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mosa_kernels._machine import available_cores
from mosa_kernels.backends.choice import available_backends
from mosa_kernels.backends.measured import FORMAT, REFERENCE, device_name, file_name, ranked_by_time, user_folder
from mosa_kernels.bench.case import Case, first_line
from mosa_kernels.bench.choose_gate import SECONDS, Cell, gate_apart, is_lost, provider_of, with_cases
from mosa_kernels.bench.environment import choose_device, describe
from mosa_kernels.bench.kernels import is_cold
from mosa_kernels.bench.records import Record, is_disturbed
from mosa_kernels.bench.run import Request, Say
from mosa_kernels.bench.shapes import Axes, Point
from mosa_kernels.bench.timing import Timing, in_turn, warm_up
from mosa_kernels.functional.operators import OPERATORS
from mosa_kernels.train.folder import write_json

BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_PAIRS = (("vit_b", 64), ("vit_ti", 16), ("vit_b", 256), ("vit_l", 64), ("vit_b", 16), ("vit_ti", 64))
_IMAGES, _FEATURES_OF = (64, 8, 1), (16, 1)
_CLASSES, _BATCHES = (100, 1000), (32, 256)
_DEPTH = 12
_ROUNDS, _SECONDS = 11, 1.5  # of a cell


class DeviceLostError(RuntimeError):
    """A call left the device unusable for this process; the message says which."""


def cells(device_type: str, axes: Axes | None = None) -> list[Cell]:
    """What is measured on a device; with axes, all combinations of their values in place of the usual sizes."""
    axes = axes or Axes()
    pairs: Sequence[tuple[str, int]] = _PAIRS
    if axes.model or axes.bottleneck:
        pairs = [(model, r) for model in axes.model or ("vit_b",) for r in axes.bottleneck or (64,)]
    experts, per = (axes.experts or (4,))[0], (axes.expert_per or ("sample",))[0]
    found: list[Cell] = []
    for dtype in axes.dtype or _dtypes(device_type):
        points = [Point(model, 1, r, experts, dtype, per) for model, r in pairs]
        for point in points:
            for images in axes.images or _IMAGES:
                found += [Cell(name, point._replace(images=images)) for name in ("adapter_forward", "adapter")]
        deep = [point._replace(layers=_DEPTH) for point in points]
        found += [Cell(name, point) for name in ("merge", "masked_adamw") for point in deep]
        for images in axes.images or _FEATURES_OF:
            features = points[0]._replace(images=images, bottleneck=1, layers=_DEPTH // 2)
            found.append(Cell("feature_alignment", features))
        for classes in _CLASSES:
            for batch in axes.images or _BATCHES:
                found.append(Cell("consistency", Point(images=batch, bottleneck=1, dtype=dtype), classes))
        found += [Cell("split", point) for point in points]
    different = {cell.name: cell for cell in reversed(found)}  # the first of those that are asked by the same sizes
    return [
        cell
        for cell in reversed(different.values())
        if set(BACKENDS[device_type]) & OPERATORS[cell.operator].backends.keys()
    ]


def _dtypes(device_type: str) -> list[str]:
    if device_type == "cpu":
        return ["fp32", "bf16"]
    return [name for name in ("bf16", "fp32", "fp16") if name != "bf16" or torch.cuda.is_bf16_supported()]


def table_file(output: Path | None, device: torch.device) -> Path:
    """Where the table goes: a name in .json is the file, another one a folder, None the user's cache."""
    if output is not None and output.suffix == ".json":
        return output
    return (user_folder() if output is None else output) / file_name(device_name(device))


def choose(request: Request, output: Path | None, say: Say) -> tuple[Record, Path]:
    """Measures the table and writes it, cell by cell.

    Args:
        request: its device, axes, threads, rounds, processor_time and deadline hold here too.
        output: see `table_file`.
        say: told what is done.

    Raises:
        DeviceLostError: a call left the device unusable. What was measured until then is in the file.
        ValueError: the device is not there, or the request asks for what is no part of this.
    """
    for name in ("preset", "only", "providers", "models", "batch"):
        if getattr(request, name) != getattr(Request(), name):
            raise ValueError(f"{name}: expected without --choose, which measures all that it needs")
    began = time.perf_counter()
    device = choose_device(request.device)
    if request.processor_time or request.threads is not None:
        torch.set_num_threads(1 if request.processor_time else request.threads or 1)
    file = table_file(output, device)
    answers = available_backends()
    names = [name for name in BACKENDS[device.type] if answers[name] is True]
    wanted = cells(device.type, request.axes)
    say(f"{device_name(device)}: {len(wanted)} calls; {', '.join(names) or 'no backend'} beside the definition")
    reasons = _gate(names, wanted, device, request.deadline, say)
    warm_up(device)
    record = _described(device, {name: answers[name] for name in BACKENDS[device.type] if answers[name] is not True})
    try:
        for cell, case in with_cases(wanted, device):
            if request.deadline is not None and time.perf_counter() - began > request.deadline:
                record["not_measured"].append(cell.name)
                continue
            say(cell.name)
            mine = {name: reasons[name, cell] for name in names if (name, cell) in reasons}
            record["cells"].append(_measure(cell, case, mine, device, request))
            record["seconds"] = round(time.perf_counter() - began, 1)
            write_json(file, record)
    except DeviceLostError as error:
        raise DeviceLostError(f"{error}; {len(record['cells'])} of {len(wanted)} calls are in {file}") from error
    record["complete"] = not record["not_measured"]
    write_json(file, record)
    return record, file


def _described(device: torch.device, unavailable: dict[str, Any]) -> Record:
    machine = describe(device)
    return {
        "format": FORMAT,
        "device": device_name(device),
        "device_type": device.type,
        "capability": machine["gpu"]["capability"] if device.type == "cuda" else machine["cpu_capability"],
        "threads": machine["threads"],
        "versions": machine["versions"],
        "commit": machine["commit"],
        "made": machine["made"],
        "complete": False,
        "seconds": 0.0,
        "unavailable": unavailable,
        "not_measured": [],
        "cells": [],
    }


def _gate(
    names: Sequence[str], wanted: Sequence[Cell], device: torch.device, deadline: int | None, say: Say
) -> dict[tuple[str, Cell], str | None]:
    """Per backend and cell None, or why it may not run. On a GPU several processes at once: they compile for long.

    Half of a deadline is left for the times, whichever process hangs.
    """
    groups: dict[tuple[str, str], list[Cell]] = {}
    for name in names:
        for cell in wanted:
            if name in OPERATORS[cell.operator].backends:
                groups.setdefault((name, cell.point.dtype if device.type == "cuda" else ""), []).append(cell)
    say(f"error gate, in {len(groups)} process(es) of their own")
    workers = max(1, min(len(groups), available_cores() // 2)) if device.type == "cuda" else 1
    seconds = SECONDS
    if deadline is not None and groups:
        seconds = min(seconds, deadline / 2 / math.ceil(len(groups) / workers))
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda group: gate_apart(group[0][0], group[1], device, seconds), groups.items())
        return {
            (name, cell): reason
            for ((name, _), group), answers in zip(groups.items(), found, strict=True)
            for cell, reason in zip(group, answers, strict=True)
        }


def _measure(
    cell: Cell, case: Case, reasons: dict[str, str | None], device: torch.device, request: Request
) -> dict[str, Any]:
    left_out = {name: reason for name, reason in reasons.items() if reason is not None}
    calls: dict[str, Callable[[], object]] = {}
    for name in (REFERENCE, *(name for name in reasons if name not in left_out)):
        try:
            calls[name] = provider_of(case, name).prepare().run
            calls[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # memory ran out, say: the others may still be measured
            calls.pop(name, None)
            left_out[name] = _failure(name, cell, error, device)
    cold = is_cold(case, device)
    timings = _timed(cell, calls, left_out, device, request, cold)
    times = {name: timing.median for name, timing in timings.items()}
    return {
        "operator": cell.operator,
        "dtype": cell.dtype,
        "sizes": cell.sizes,
        "backend": next(iter(ranked_by_time(times)), REFERENCE),
        "ms": times,
        "left_out": left_out,
        "disturbed": any(is_disturbed(timing._asdict()) for timing in timings.values()),
    }


def _timed(
    cell: Cell,
    calls: dict[str, Callable[[], object]],
    left_out: dict[str, str],
    device: torch.device,
    request: Request,
    cold: bool,
) -> dict[str, Timing]:
    """The times of each. One that raises after all is left out, and the others are timed without it."""
    running = REFERENCE

    def noted(name: str) -> object:
        nonlocal running
        running = name
        return calls[name]()

    while calls:
        try:
            noting = {name: partial(noted, name) for name in calls}
            return in_turn(
                noting,
                device,
                rounds=request.rounds or _ROUNDS,
                seconds=_SECONDS,
                cold=cold,
                processor_time=request.processor_time,
            )
        except Exception as error:
            left_out[running] = _failure(running, cell, error, device)
            del calls[running]
    return {}


def _failure(name: str, cell: Cell, error: Exception, device: torch.device) -> str:
    if is_lost(device):
        raise DeviceLostError(
            f"{name} left {device} unusable for this process in {cell.name}: {first_line(error)}"
        ) from error
    return first_line(error)
