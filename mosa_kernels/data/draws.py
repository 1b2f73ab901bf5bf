"""Random numbers that belong to an image: a counter-based stream per (seed, stream name, image index).

The n-th number of an image depends on nothing else, so that image 17 is the same whether ten or ten thousand are drawn,
in whatever order, on whatever machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): uint64 to uint64, elementwise."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Draws:
    """Random numbers for a batch of images, one row an image.

    Args:
        seed: any integer.
        stream: names what is drawn ("source/train"); different names give independent numbers.
        indices: image numbers, integers [B].
    """

    def __init__(self, seed: int, stream: str, indices: NDArray[np.integer]) -> None:
        key = hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8]
        start = np.frombuffer(key, dtype="<u8").astype(np.uint64)
        self.indices = np.asarray(indices)
        self._start = _mix(start + self.indices.astype(np.uint64) * _STEP)  # [B]
        self._used = 0

    def __len__(self) -> int:
        return len(self.indices)

    def _bits(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        count = int(np.prod(shape, dtype=np.int64))
        counters = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        return _mix(self._start[:, None] + counters * _STEP).reshape(len(self), *shape)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()) -> NDArray[np.float32]:
        """Uniform in [low, high), float32 [B, *shape]."""
        unit = (self._bits(shape) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        return unit * np.float32(high - low) + np.float32(low)

    def integers(self, stop: int, shape: tuple[int, ...] = ()) -> NDArray[np.int64]:
        """Uniform in {0, ..., stop - 1}, int64 [B, *shape]."""
        return ((self._bits(shape) >> np.uint64(32)) * np.uint64(stop) >> np.uint64(32)).astype(np.int64)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A random order of 0 .. count - 1 for each image, int64 [B, count]."""
        return np.argsort(self._bits((count,)), axis=1, kind="stable")
