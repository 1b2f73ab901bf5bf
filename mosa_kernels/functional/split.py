"""Splitting a projection into disjoint experts (arXiv 2312.02923, section 3.2, Eq. 3)."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Granularity = Literal["element", "row", "column", "block", "even_rows", "even_columns"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
MAX_EXPERTS = 255


def split(
    shape: tuple[int, int],
    num_experts: int = 4,
    granularity: str = "element",
    generator: torch.Generator | None = None,
    *,
    block_size: int = 16,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws the owner of every entry of a projection.

    Every unit (an entry, a row, a column, a block) gets a uniform score; expert i owns the units between the i-th and
    the (i+1)-th N-quantile, by rank, so the experts are disjoint, cover everything and differ by at most one unit.

    Args:
        shape: shape of the weight, (out_features, in_features).
        num_experts: N, from 1 to 255 and at most the number of units.
        granularity: "element" (the paper), "row" or "column" (an expert owns whole rows or columns), "block" (square
            tiles), "even_rows" or "even_columns" (every row, or column, is shared equally among the experts).
        generator: source of the scores; it has to live on `device`. None: the default generator.
        block_size: side of the tiles of "block"; the last ones may be smaller.
        device: where the assignment is made; by default that of the generator, else the CPU.

    Returns:
        uint8 tensor of the given shape, values 0 to N - 1.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape: expected two positive sizes, got {tuple(shape)}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: expected 1 to {MAX_EXPERTS}, got {num_experts}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    if device is None:
        device = generator.device if generator is not None else "cpu"

    rows, columns = shape
    grids = {
        "element": (1, rows * columns),
        "row": (1, rows),
        "column": (1, columns),
        "block": (1, math.ceil(rows / block_size) * math.ceil(columns / block_size)),
        "even_rows": (rows, columns),
        "even_columns": (columns, rows),
    }
    lines, units = grids[granularity]
    if num_experts > units:
        raise ValueError(
            f"num_experts: expected at most {units} for {granularity} splits of {rows} x {columns}, got {num_experts}"
        )
    owners = _owners_by_rank(lines, units, num_experts, generator, device)  # [lines, units]

    if granularity == "row":
        owners = owners.view(rows, 1).expand(rows, columns)
    elif granularity == "column":
        owners = owners.view(1, columns).expand(rows, columns)
    elif granularity == "even_columns":
        owners = owners.t()
    elif granularity == "block":
        tiles = owners.view(math.ceil(rows / block_size), -1)
        owners = tiles.repeat_interleave(block_size, 0)[:rows].repeat_interleave(block_size, 1)[:, :columns]
    return owners.reshape(rows, columns).contiguous()


def _owners_by_rank(
    lines: int, units: int, num_experts: int, generator: torch.Generator | None, device: torch.device | str
) -> Tensor:
    """Per line, `rank * N // units` of uniform scores: uint8 [lines, units]."""
    scores = torch.rand(lines, units, generator=generator, device=device, dtype=torch.float64)
    order = scores.argsort(dim=1, stable=True)
    owners_in_order = (torch.arange(units, device=device) * num_experts // units).to(torch.uint8)
    return torch.empty(lines, units, dtype=torch.uint8, device=device).scatter_(
        1, order, owners_in_order.expand(lines, units)
    )
