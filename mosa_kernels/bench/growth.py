"""How time and memory grow with tokens, bottleneck, experts and the number of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mosa_kernels.bench.adapter import Adapter
from mosa_kernels.bench.adapter_work import training_state
from mosa_kernels.bench.kernels import Effort, forget_compiled, measure_case
from mosa_kernels.bench.limits import Limits
from mosa_kernels.bench.shapes import Axes, Point

AXES = {"images": "tokens", "bottleneck": "bottleneck r", "experts": "experts N", "layers": "adapters"}
"""Axes of a point, and what they are called."""

_VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "smoke": {"images": (1, 2), "bottleneck": (8, 16), "experts": (1, 2), "layers": (1, 2)},
    "quick": {"images": (1, 4, 16, 64), "bottleneck": (8, 32, 128), "experts": (1, 4, 8), "layers": (1, 4)},
    "full": {
        "images": (1, 4, 16, 64, 256),
        "bottleneck": (8, 16, 32, 64, 128, 256),
        "experts": (1, 2, 4, 8),
        "layers": (1, 2, 4, 8, 12),
    },
}


def growth_points(preset: str, device_type: str, asked: Axes | None = None) -> Iterator[tuple[str, Point]]:
    """(axis, point): each axis varied alone from a base. One expert a call, which every provider takes.

    Of the values asked for, the first makes the base; several take the place of the preset's along their axis.
    """
    if preset == "smoke":
        base = Point("vit_ti", 2, 8, 2, "fp32", "call")
    elif device_type == "cuda":
        base = Point("vit_b", 32, 64, 4, "bf16", "call")
    else:
        base = Point("vit_s", 8, 32, 4, "fp32", "call")
    given = {name: values for name in Axes.names() if asked is not None and (values := getattr(asked, name))}
    base = base._replace(**{name: values[0] for name, values in given.items()})
    for axis, usual in _VALUES[preset].items():
        for value in given[axis] if len(given.get(axis, ())) > 1 else usual:
            yield axis, base._replace(**{axis: value})  # type: ignore[arg-type]


def measure_growth(axis: str, point: Point, device: torch.device, limits: Limits, effort: Effort) -> dict[str, Any]:
    """Forward + backward at one point; the record of `measure_case` with the axis and its value."""
    forget_compiled(effort)
    record = measure_case(Adapter(point, device, effort.compiled).case("both"), device, limits, effort)
    for row in record["rows"]:
        row["state_bytes"] = training_state(row["provider"], point)
    return {**record, "axis": AXES[axis], "value": point.tokens if axis == "images" else getattr(point, axis)}
