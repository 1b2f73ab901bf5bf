"""The owner of every entry of a projection: balanced, random, a function of a seed and of the entry's position alone.

Ranks of independent uniform scores are a uniform random permutation, so the split of Eq. 3 (arXiv 2312.02923) needs no
scores: a permutation is drawn, and evaluated entry by entry without a sort. It is the card shuffle "swap or not"
(Hoang, Morris and Rogaway, CRYPTO 2012), which takes any number of cards: a round pairs every place with its mirror
image at a random point, and each pair swaps by the toss of a coin. Mirrors and coins come from the counter-based
generator of `dropout.py`. csrc/split_math.h does the same in C++, bit by bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.dropout import as_int32, hash32

ROUNDS = 24
"""As in csrc/split_math.h, with the figures."""


class SplitLayout(NamedTuple):
    """Which unit an entry belongs to, in the order of csrc/split_bindings.cpp.

    Entry (i, j) belongs to unit ``i // side * unit_per_row + j // side * unit_per_column`` of line
    ``i * line_per_row + j * line_per_column``; every line is shared out by itself.
    """

    rows: int
    columns: int
    num_experts: int
    units: int  # of a line
    side: int = 1
    line_per_row: int = 0
    line_per_column: int = 0
    unit_per_row: int = 0
    unit_per_column: int = 0


def available() -> tuple[bool, str]:
    return True, ""


def supports_split(layout: SplitLayout, seed: Tensor, device: torch.device) -> tuple[bool, str]:
    return True, ""


def split(layout: SplitLayout, seed: Tensor, device: torch.device) -> Tensor:
    """The definition, on any device, without reading the seed back.

    Args:
        seed: int64 [], on any device.

    Returns:
        uint8 [rows, columns].
    """
    lines = 1 + (layout.rows - 1) * layout.line_per_row + (layout.columns - 1) * layout.line_per_column
    place = _shuffled_places(seed.to(device), lines, layout.units)
    owners = (place.long() * layout.num_experts // layout.units).to(torch.uint8)  # [lines, units]
    i = torch.arange(layout.rows, device=device).unsqueeze(1)
    j = torch.arange(layout.columns, device=device)
    line = i * layout.line_per_row + j * layout.line_per_column
    unit = i // layout.side * layout.unit_per_row + j // layout.side * layout.unit_per_column
    return owners[line, unit]


def _shuffled_places(seed: Tensor, lines: int, units: int) -> Tensor:
    """Where the permutation of each line takes each of its units, int32 [lines, units]."""
    line = torch.arange(lines, device=seed.device, dtype=torch.int32).unsqueeze(1)
    seed_key = (seed.to(torch.int32), (seed >> 32).to(torch.int32))  # the conversion keeps the low 32 bits
    key = (_draw(seed_key, 2 * line), _draw(seed_key, 2 * line + 1))
    place = torch.arange(units, device=seed.device, dtype=torch.int32).expand(lines, units)
    for number in range(ROUNDS):
        word = _draw(key, torch.full_like(line, number)).long() & 0xFFFFFFFF  # as an unsigned number
        mirror = ((word * units) >> 32).to(torch.int32)  # [lines, 1]
        partner = torch.where(mirror >= place, mirror - place, mirror + (units - place))
        coin = _draw(key, torch.maximum(place, partner) + as_int32(ROUNDS + number * units)) < 0  # its first bit
        place = torch.where(coin, partner, place)
    return place


def _draw(key: tuple[Tensor, Tensor], counter: Tensor) -> Tensor:
    """A random int32 for each counter."""
    low, high = key
    return hash32(hash32(counter + low) ^ high)
