"""The merge of all adapters of a model in one launch, of any shapes and dtypes (arXiv 2312.02923, Eq. 7 and 8)."""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.backends.merge_kernels import Description, describe, empty_outputs, takes
from mosa_kernels.backends.triton.backend import available, misplaced
from mosa_kernels.backends.triton.launch import Launch, interpreted
from mosa_kernels.backends.triton.pointers import (
    bits_of,
    entry,
    find_item,
    first_programs,
    number,
    on_device,
    padded_items,
    upload,
)

__all__ = ["available", "merge", "supports_merge"]

_COLUMNS = 1024  # of a row of the down-projection at a time
_UP_ROWS = 16  # rows of the up-projection a program
_UP_COLUMNS = 64
_NUM_WARPS = 4


@triton.jit
def load_any(address, dtype, offset, mask):
    """Elements of a type known at run time, in float32."""
    if dtype == 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0)
    elif dtype == 1:
        value = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=mask, other=0).to(tl.float32)
    return value


@triton.jit
def store_any(address, dtype, offset, value, mask):
    if dtype == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, value, mask=mask)
    elif dtype == 1:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, value.to(tl.float16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offset, value.to(tl.bfloat16), mask=mask)


@triton.jit
def merge_kernel(
    table, items,
    ITEMS: tl.constexpr, COLUMNS: tl.constexpr, UP_ROWS: tl.constexpr, UP_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each adapter the first programs merge a row of the down-projection each, the others UP_ROWS of the other."""
    program = tl.program_id(0)
    item = find_item(table, program, items, ITEMS)
    block = program - entry(table, 0, items, item).to(tl.int32)
    rank = entry(table, 1, items, item).to(tl.int32)
    width = entry(table, 2, items, item).to(tl.int32)
    out_dtype = entry(table, 31, items, item)
    if block < rank:
        w_down = entry(table, 4, items, item)
        w_down_at = block * entry(table, 5, items, item)
        w_down_dtype = entry(table, 6, items, item)
        initial = entry(table, 7, items, item)
        initial_at = block * entry(table, 8, items, item)
        initial_dtype = entry(table, 9, items, item)
        gamma = entry(table, 12, items, item)
        gamma_dtype = entry(table, 13, items, item)
        beta = entry(table, 14, items, item)
        beta_dtype = entry(table, 15, items, item)
        factor = number(table, 26, items, item)
        out_w_down = entry(table, 27, items, item)
        sums = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = column < width
            w = load_any(w_down, w_down_dtype, w_down_at + column, mask)
            if (initial != 0) & (factor != 1.0):
                rest = load_any(initial, initial_dtype, initial_at + column, mask)
                w = rest + factor * (w - rest)
            if beta != 0:
                sums += w * load_any(beta, beta_dtype, column, mask)
            if gamma != 0:
                w *= load_any(gamma, gamma_dtype, column, mask)
            store_any(out_w_down, out_dtype, block.to(tl.int64) * width + column, w, mask)
        out_b_down = entry(table, 28, items, item)
        if out_b_down != 0:
            one = tl.arange(0, 1)
            bias = tl.sum(sums, 0) + tl.zeros([1], tl.float32)
            b_down = entry(table, 10, items, item)
            if b_down != 0:
                bias += load_any(b_down, entry(table, 11, items, item), block + one, one == 0)
            store_any(out_b_down, out_dtype, block + one, bias, one == 0)
    else:
        scale = number(table, 24, items, item)
        on_device = entry(table, 22, items, item)
        if on_device != 0:
            one = tl.arange(0, 1)
            scale = tl.sum(load_any(on_device, entry(table, 23, items, item), one, one == 0), 0)
        factor = scale * number(table, 25, items, item)
        w_up = entry(table, 16, items, item)
        stride = entry(table, 17, items, item)
        w_up_dtype = entry(table, 18, items, item)
        out_w_up = entry(table, 29, items, item)
        row = (block - rank) * UP_ROWS + tl.arange(0, UP_ROWS)
        for start in range(0, rank, UP_COLUMNS):
            column = start + tl.arange(0, UP_COLUMNS)
            mask = (row < width)[:, None] & (column < rank)[None, :]
            w = load_any(w_up, w_up_dtype, row[:, None] * stride + column[None, :], mask)
            out_at = row[:, None].to(tl.int64) * rank + column[None, :]
            store_any(out_w_up, out_dtype, out_at, factor * w, mask)
        out_b_up = entry(table, 30, items, item)
        if out_b_up != 0:
            b_up = entry(table, 19, items, item)
            b_up_stride = entry(table, 20, items, item)
            b_up_dtype = entry(table, 21, items, item)
            experts = entry(table, 3, items, item).to(tl.int32)
            bias = tl.zeros([UP_ROWS], tl.float32)
            for expert in range(experts):
                bias += load_any(b_up, b_up_dtype, expert * b_up_stride + row, row < width)
            store_any(out_b_up, out_dtype, row, scale * (bias / experts.to(tl.float32)), row < width)


def supports_merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> tuple[bool, str]:
    """Whether the kernel takes these adapters, and if not, why."""
    interpreting = interpreted(merge_kernel)
    for adapter in adapters:
        if reason := misplaced("w_down", adapter.w_down, interpreting):
            return False, reason
    return takes(adapters, dtype, "cpu" if interpreting else "cuda")


def merge(adapters: Sequence[MergeInput], fold_norm: bool, dtype: torch.dtype | None) -> list[MergedWeights]:
    """All adapters, which live on one device, in one launch on the current stream; nothing waits."""
    outputs = [empty_outputs(adapter, fold_norm, dtype or adapter.w_down.dtype) for adapter in adapters]
    keep_alive: list[Tensor] = []
    described = [describe(a, fold_norm, out, keep_alive) for a, out in zip(adapters, outputs, strict=True)]
    device = adapters[0].w_down.device
    with on_device(device):
        merge_launch(described, device).run()
    return outputs


def merge_launch(adapters: Sequence[Description], device: torch.device) -> Launch:
    first, programs = first_programs([one.rank - (-one.width // _UP_ROWS) for one in adapters])
    table = upload(list(zip(*(_numbers(*pair) for pair in zip(first, adapters, strict=True)), strict=True)), device)
    constants = (padded_items(len(adapters)), _COLUMNS, _UP_ROWS, _UP_COLUMNS)
    return Launch(merge_kernel, (programs, 1, 1), (table,), (len(adapters),), ("i32",), constants, _NUM_WARPS, 1)


def _numbers(first: int, one: Description) -> tuple[int, ...]:
    """The adapter's column of the table."""
    return (
        first,
        *(one.rank, one.width, one.experts),
        *(*one.w_down, *one.w_down_init, *one.b_down, *one.gamma, *one.beta, *one.w_up, *one.b_up, *one.scale),
        *(bits_of(value) for value in (one.scale_value, one.up_factor, one.down_factor)),
        *(one.out_w_down, one.out_b_down, one.out_w_up, one.out_b_up, one.out_dtype),
    )
