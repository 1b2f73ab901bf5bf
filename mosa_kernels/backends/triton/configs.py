"""Tile sizes by width, bottleneck, dtype and architecture. Frozen: nothing is measured at run time.

The token count is no key, so that no new kernel is compiled for a new batch. The entries are chosen so that ahead of
time compilation reports no spilled registers and at most 99 KB of shared memory (what a block may use on the smaller
GPUs of the 8.x and 12.x families), which `tests/backends/triton/test_compile.py` holds. Among those that pass, the ones
with more warps on a multiprocessor were taken; their speed has not been measured.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tiles of a kernel."""

    block_t: int  # tokens
    block_d: int  # columns
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """The tiles of the three kernels that multiply matrices."""

    forward: Config
    tokens: Config  # the backward kernel over tokens
    weights: Config  # the backward kernel over weights
    programs: int  # how many programs the last one splits its tokens into, about two a multiprocessor


def padded(size: int) -> int:
    """The power of two that a dimension of a matrix product is padded to."""
    return max(16, 1 << (size - 1).bit_length())


@cache
def configs(width: int, units: int, matmul_dtype: torch.dtype, arch: int, listed: bool = False) -> Configs:
    """The table.

    Args:
        units: of the bottleneck that are multiplied at a time.
        arch: 10 times the compute capability.
        listed: whether they are read from lists, whose addresses take registers.
    """
    half = _HALF_HOPPER if 90 <= arch < 120 else _HALF_AMPERE  # 12.x has the shared memory of 8.6
    table = _FLOAT32 if matmul_dtype == torch.float32 else half
    columns = padded(width)
    size = padded(units) * (2 if listed and matmul_dtype == torch.float32 else 1)
    row = table[next(limit for limit in sorted(table) if size <= limit)]
    forward, tokens, weights = (config._replace(block_d=min(config.block_d, columns)) for config in row)
    return Configs(forward, tokens, weights, programs=264 if arch >= 90 else 216)


_Row = tuple[Config, Config, Config]

# padded bottleneck: forward, backward over tokens, backward over weights
_HALF_AMPERE: dict[int, _Row] = {
    64: (Config(64, 32, 4, 3), Config(64, 32, 8, 3), Config(64, 64, 8, 3)),
    128: (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
}
_HALF_HOPPER: dict[int, _Row] = {
    64: (Config(64, 64, 8, 3), Config(64, 64, 8, 3), Config(64, 64, 8, 3)),
    128: (Config(64, 64, 8, 2), Config(64, 32, 8, 2), Config(32, 64, 8, 2)),
    256: (Config(64, 32, 8, 2), Config(32, 32, 8, 2), Config(32, 32, 8, 2)),
}
_FLOAT32: dict[int, _Row] = {
    64: (Config(32, 32, 4, 2), Config(32, 16, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(32, 16, 8, 2), Config(32, 16, 8, 2), Config(32, 32, 8, 2)),
    256: (Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 2)),
}
