"""Splitting a projection into disjoint experts (arXiv 2312.02923, section 3.2, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mosa_kernels.backends import split as reference
from mosa_kernels.backends.cpu import split as cpu
from mosa_kernels.backends.cuda import split as cuda
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.split import SplitLayout

Granularity = Literal["element", "row", "column", "block", "even_rows", "even_columns"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
MAX_EXPERTS = 255
MAX_UNITS = 2**31 - 1


def _kind(layout: SplitLayout, seed: Tensor, device: torch.device) -> Kind:
    return "split", device, torch.uint8, layout.rows * layout.columns


OPERATOR = Operator(
    "split",
    {
        "reference": Backend(reference.available, lambda: reference),
        "cpu": Backend(cpu.available, lambda: cpu),
        "cuda": Backend(cuda.available, lambda: cuda),
    },
    {"cpu": ("cpu",)},
    kind=_kind,
)
"""768 x 64 entries on one core: 3.3 ms compiled, 18 ms in PyTorch (ranking as many scores took 4.4 ms)."""


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

    Eq. 3 gives every unit (an entry, a row, a column, a block) a uniform score, and expert i the units between the i-th
    and the (i+1)-th N-quantile. Ranks of independent uniform scores are a uniform random permutation, so this draws the
    permutation itself, from one random number, and `owner = place * N // units`: the same distribution, without scores
    to sort. The experts are disjoint, cover everything and differ by at most one unit.

    One state of the generator gives one split, bit by bit, whatever device it is made on.

    Args:
        shape: shape of the weight, (out_features, in_features).
        num_experts: N, from 1 to 255 and at most the number of units.
        granularity: "element" (the paper), "row" or "column" (an expert owns whole rows or columns), "block" (square
            tiles), "even_rows" or "even_columns" (every row, or column, is shared equally among the experts). Where the
            bottleneck is wider than 64, GPU kernels leave out products of the up-projection with what the active expert
            does not own. By "column" those of Triton and CUDA C++ compute its units alone (CUDA C++ up to 64 of them);
            by "block" those of CUDA C++ skip 16 x 16 tiles (at r = 128 and N = 4, 5/8 of the forward and 7/10 of the
            backward pass's products are left). The other granularities leave hardly a whole tile to skip. The C++
            kernels for CPUs multiply owned entries alone whatever the granularity, for bf16 on AMD's CPUs with AVX-512
            BF16, where that is faster: from about N = 3 on ("even_rows" gives them columns of equal length, which suits
            them best).
            There, at 768 x 64 and N = 4, both passes ran 1.10 to 1.14 times as fast by "block", 1.03 to 1.07 by
            "column" and 0.87 by "row", whose products stay dense (`mosa-kernels bench --only granularity`; on a GPU not
            measured).
        generator: source of the random number, on any device. None: the CPU's default generator.
        block_size: side of the tiles of "block"; the last ones may be smaller.
        device: where the assignment is made; by default that of the generator, else the CPU.

    Returns:
        uint8 tensor of the given shape, values 0 to N - 1.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_types(shape, num_experts, block_size, generator)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape: expected two positive sizes, got {tuple(shape)}")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts: expected 1 to {MAX_EXPERTS}, got {num_experts}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity: expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    rows, columns = shape
    layout = _layout(rows, columns, num_experts, granularity, block_size)
    if num_experts > layout.units:
        raise ValueError(
            f"num_experts: expected at most {layout.units} for {granularity} splits of {rows} x {columns}, "
            f"got {num_experts}"
        )
    if layout.units > MAX_UNITS:
        raise ValueError(f"shape: expected at most {MAX_UNITS} units for {granularity} splits, got {layout.units}")
    source = torch.device("cpu") if generator is None else generator.device
    seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=source)
    device = torch.device(source if device is None else device)
    return OPERATOR.run(OPERATOR.choose(device.type, None, layout, seed, device), layout, seed, device)


def _check_types(shape: Any, num_experts: Any, block_size: Any, generator: Any) -> None:
    if not isinstance(shape, Sequence) or not all(hasattr(size, "__index__") for size in shape):
        raise TypeError(f"shape: expected two whole numbers, got {shape!r}")
    for name, number in (("num_experts", num_experts), ("block_size", block_size)):
        if not hasattr(number, "__index__"):
            raise TypeError(f"{name}: expected a whole number, got {number!r}")
    if not isinstance(generator, (torch.Generator, NoneType)):
        raise TypeError(f"generator: expected a torch.Generator or None, got {generator!r}")


def _layout(rows: int, columns: int, num_experts: int, granularity: str, block_size: int) -> SplitLayout:
    if granularity == "row":
        return SplitLayout(rows, columns, num_experts, rows, unit_per_row=1)
    if granularity == "column":
        return SplitLayout(rows, columns, num_experts, columns, unit_per_column=1)
    if granularity == "even_rows":
        return SplitLayout(rows, columns, num_experts, columns, line_per_row=1, unit_per_column=1)
    if granularity == "even_columns":
        return SplitLayout(rows, columns, num_experts, rows, line_per_column=1, unit_per_row=1)
    side = block_size if granularity == "block" else 1
    across = -(-columns // side)
    units = -(-rows // side) * across
    return SplitLayout(rows, columns, num_experts, units, side, unit_per_row=across, unit_per_column=1)
