"""Counter-based dropout: which bottleneck entries are kept is a function of the seed and the entry's index.

Nothing has to be stored for the backward pass, and every backend draws the same mask. The generator is a 32-bit
integer hash applied twice, once with each half of the seed: two multiplications and three shifts a round, a tenth of
the instructions of Philox, whose statistical guarantees dropout does not need.
"""

from __future__ import annotations

import torch
from torch import Tensor

HASH_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)


def as_int32(value: int) -> int:
    """The signed number with the same low 32 bits."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers that mixes every input bit into every output bit. int32 -> int32."""
    x = (x ^ _shift_right(x, 16)) * as_int32(HASH_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 15)) * as_int32(HASH_MULTIPLIERS[1])
    return x ^ _shift_right(x, 15)


def drop_threshold(p: float) -> int:
    """Entries whose unsigned 32-bit draw is below this are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def stream_counters(seed: Tensor | int, rows: int, units: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `keep_rows` needs to know of each row: its first index plus the seed's low half, and the seed's high half.

    Args:
        seed: int64, [] for one stream over all rows, or [G] for G equal runs of rows, each counted from zero.
        rows: number of tokens, a multiple of G.
        units: width of the bottleneck.

    Returns:
        Two int32 tensors that broadcast to [rows, 1].
    """
    seeds = torch.as_tensor(seed, device=device, dtype=torch.int64).reshape(-1, 1)  # [G, 1]
    groups = seeds.shape[0]
    first = torch.arange(rows // groups, device=device) * units  # [rows / G]
    start = (first + seeds).to(torch.int32).view(rows, 1)  # the conversion keeps the low 32 bits
    high = (seeds >> 32).to(torch.int32)
    return start, high.expand(groups, rows // groups).reshape(rows, 1)


def keep_rows(start: Tensor, high: Tensor, units: int, p: float) -> Tensor:
    """The rows of `keep_mask` whose counters (`stream_counters`) are `start` and `high`, bool [rows, units]."""
    index = start + torch.arange(units, device=start.device, dtype=torch.int32)  # [rows, units]
    bits = hash32(hash32(index) ^ high)
    sign = -0x80000000  # flipping the sign bit orders signed numbers as unsigned ones
    return (bits ^ sign) >= drop_threshold(p) + sign


def keep_mask(seed: Tensor | int, rows: int, units: int, p: float, device: torch.device) -> Tensor:
    """Which entries of a bottleneck activation survive dropout, bool [rows, units].

    Args:
        seed: int64, [] for one stream over all rows, or [G] for G equal runs of rows, each counted from zero.
        rows: number of tokens, a multiple of G.
        units: width of the bottleneck.
        p: probability of dropping an entry.
    """
    return keep_rows(*stream_counters(seed, rows, units, device), units, p)
