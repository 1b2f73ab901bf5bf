"""Counter-based dropout: which bottleneck entries are kept is a function of the seed and the entry's index.

Nothing has to be stored for the backward pass, and every backend draws the same mask. The generator is a 32-bit
integer hash applied twice, once with each half of the seed: two multiplications and three shifts a round, a tenth of
the instructions of Philox, whose statistical guarantees dropout does not need.
"""

from __future__ import annotations

import torch
from torch import Tensor

HASH_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)


def _as_int32(value: int) -> int:
    """The signed number with the same 32 bits."""
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """A bijection of the 32-bit integers that mixes every input bit into every output bit. int32 -> int32."""
    x = (x ^ _shift_right(x, 16)) * _as_int32(HASH_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, 15)) * _as_int32(HASH_MULTIPLIERS[1])
    return x ^ _shift_right(x, 15)


def drop_threshold(p: float) -> int:
    """Entries whose unsigned 32-bit draw is below this are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def keep_mask(seed: Tensor | int, rows: int, units: int, p: float, device: torch.device) -> Tensor:
    """Which entries of a bottleneck activation survive dropout, bool [rows, units].

    Args:
        seed: int64, [] for one stream over all rows, or [G] for G equal runs of rows, each counted from zero.
        rows: number of tokens, a multiple of G.
        units: width of the bottleneck.
        p: probability of dropping an entry.
    """
    seeds = torch.as_tensor(seed, device=device, dtype=torch.int64).reshape(-1, 1)  # [G, 1]
    low, high = seeds.to(torch.int32), (seeds >> 32).to(torch.int32)
    index = torch.arange(rows // seeds.shape[0] * units, device=device, dtype=torch.int32)
    bits = hash32(hash32(index + low) ^ high)  # [G, rows / G * units]
    sign = -0x80000000  # flipping the sign bit orders signed numbers as unsigned ones
    return ((bits ^ sign) >= drop_threshold(p) + sign).view(rows, units)
