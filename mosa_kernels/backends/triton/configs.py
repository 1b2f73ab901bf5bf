"""Tile sizes by width, bottleneck, dtype and architecture. Frozen: nothing is measured at run time.

The token count is no key, so that no new kernel is compiled for a new batch. The entries are chosen so that ahead of
time compilation reports no spilled registers and at most 99 KB of shared memory (what a block may use on the smaller
GPUs of the 8.x and 12.x families), which `tests/backends/triton/test_compile.py` holds; where options need more
memory, such as float32 weights in a half precision product, a launch prefetches less far (`Launch.compile`). Among
those that pass, the ones with more warps on a multiprocessor were taken; their speed has not been measured.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from mosa_kernels.backends.variables import whole_number


class Config(NamedTuple):
    """Tiles of a kernel."""

    block_t: int  # tokens
    block_d: int  # columns
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """The tiles of the kernels that multiply matrices."""

    forward: Config
    tokens: Config  # the backward kernel over tokens
    weights: Config  # the backward kernel over weights
    together: Config  # the backward kernel that does the work of both
    programs: int  # how many programs the kernel over weights has, about two a multiprocessor; half for the last one


def padded(size: int) -> int:
    """The power of two that a dimension of a matrix product is padded to."""
    return max(16, 1 << (size - 1).bit_length())


ONE_LAUNCH = whole_number("MOSA_TRITON_ONE_LAUNCH", "a number of units such as 16, or 0 for none")
"""The widest padded bottleneck whose backward pass runs in one launch (`adapter_backward_together`).

None does: counted, it moves three quarters of the bytes of three launches at r = 16, d = 768 and 128 images, but it has
not been measured. MOSA_TRITON_ONE_LAUNCH=16 sets it, to compare.
"""


@cache
def configs(width: int, units: int, matmul_dtype: torch.dtype, arch: int, crowded: bool = False) -> Configs:
    """The table.

    Args:
        units: of the bottleneck that are multiplied at a time.
        arch: 10 times the compute capability.
        crowded: whether addresses of listed units or a sparse down-projection's second weights take registers, too.
    """
    family = "hopper" if 90 <= arch < 120 else "ampere"  # 12.x has the shared memory of 8.6
    half = _HALF_HOPPER if family == "hopper" else _HALF_AMPERE
    table = _FLOAT32 if matmul_dtype == torch.float32 else half
    columns = padded(width)
    size = padded(units)
    if crowded and matmul_dtype == torch.float32:
        size = min(max(128, 2 * size), max(table))
    row = table[next(limit for limit in sorted(table) if size <= limit)]
    forward, tokens, weights = (config._replace(block_d=min(config.block_d, columns)) for config in row)
    together = _TOGETHER["float32" if matmul_dtype == torch.float32 else family]
    together = together._replace(block_d=min(together.block_d, columns))
    return Configs(forward, tokens, weights, together, programs=264 if arch >= 90 else 216)


_Row = tuple[Config, Config, Config]

# padded bottleneck: forward, backward over tokens, backward over weights
_HALF_AMPERE: dict[int, _Row] = {
    16: (Config(64, 32, 4, 3), Config(64, 32, 8, 3), Config(32, 64, 8, 3)),
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
    16: (Config(32, 32, 4, 2), Config(32, 16, 4, 2), Config(64, 32, 8, 2)),
    32: (Config(32, 16, 4, 2), Config(32, 16, 4, 2), Config(32, 32, 8, 2)),
    64: (Config(32, 32, 4, 2), Config(32, 16, 4, 2), Config(64, 32, 8, 2)),
    128: (Config(32, 16, 8, 2), Config(32, 16, 8, 2), Config(32, 32, 8, 2)),
    256: (Config(16, 32, 8, 1), Config(16, 32, 8, 1), Config(16, 32, 8, 2)),
}
_TOGETHER = {  # for padded bottlenecks of 16
    "ampere": Config(32, 64, 4, 2),
    "hopper": Config(64, 64, 8, 2),
    "float32": Config(32, 32, 4, 2),
}
