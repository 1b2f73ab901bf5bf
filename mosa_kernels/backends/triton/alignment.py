"""The mean squared differences of two passes' features, all layers in one launch each way (arXiv 2312.02923, Eq. 6).

No difference is stored: forward reads both features once, backward reads them once and writes both gradients. The sums
are in float32 and in an order that does not depend on which program finishes first.
"""

# mypy: disallow-incomplete-defs=False
# ruff: noqa: SIM102 (what a constant leaves out has an `if` of its own)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN, dtype_names
from mosa_kernels.backends.tickets import ticket
from mosa_kernels.backends.triton.backend import available, misplaced
from mosa_kernels.backends.triton.launch import ALIGNMENT, Launch, interpreted
from mosa_kernels.backends.triton.pointers import (
    arrives_last,
    bits_of,
    entry,
    find_item,
    first_programs,
    number,
    on_device,
    padded_items,
    pointer,
    upload,
)

__all__ = ["available", "feature_alignment", "feature_alignment_backward", "supports_feature_alignment"]

BLOCK = 2048
FORWARD_BLOCKS = 8  # a program: fewer sums to add up at the end
_LARGEST = 2**31 - BLOCK * FORWARD_BLOCKS
NUM_WARPS = 8  # eight entries a thread: one load of 16 bytes in half precision


@triton.jit
def places(index, row_length, stride, STRIDED: tl.constexpr):
    """Where entries lie, counted in row-major order: in one run, or in rows of one length at equal distances."""
    if STRIDED:
        row = index // row_length
        return row * stride + (index - row * row_length)
    else:  # noqa: RET505 (after a branch on a constant the compiler needs the other branch spelled out)
        return index


@triton.jit
def difference(
    table, items, item, index, inside, row_length,
    DTYPE: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    first = pointer(entry(table, 2, items, item), DTYPE, ALIGNED)
    second = pointer(entry(table, 3, items, item), DTYPE, ALIGNED)
    at1 = places(index, row_length, entry(table, 6, items, item), STRIDED)
    at2 = places(index, row_length, entry(table, 7, items, item), STRIDED)
    one = tl.load(first + at1, mask=inside, other=0).to(tl.float32)
    return one - tl.load(second + at2, mask=inside, other=0).to(tl.float32)


@triton.jit
def squares(
    table, items, item, start, size, row_length,
    DTYPE: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the squared differences of some blocks."""
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(BLOCKS):
        index = start + block * BLOCK + tl.arange(0, BLOCK)
        d = difference(table, items, item, index, index < size, row_length, DTYPE, STRIDED, ALIGNED)
        total += d * d
    return tl.sum(total, 0)


@triton.jit
def alignment_forward_kernel(
    table, parts, ticket, loss, items, programs,
    FLOAT32: tl.constexpr, FLOAT16: tl.constexpr, BFLOAT16: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr, ITEMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = find_item(table, program, items, ITEMS)
    size = entry(table, 1, items, item).to(tl.int32)
    dtype = entry(table, 4, items, item)
    row_length = entry(table, 5, items, item).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    start = (program - entry(table, 0, items, item).to(tl.int32)) * (BLOCKS * BLOCK)
    total = 0.0
    if FLOAT32:
        if dtype == 0:
            total = squares(table, items, item, start, size, row_length, tl.float32, STRIDED, ALIGNED, BLOCKS, BLOCK)
    if FLOAT16:
        if dtype == 1:
            total = squares(table, items, item, start, size, row_length, tl.float16, STRIDED, ALIGNED, BLOCKS, BLOCK)
    if BFLOAT16:
        if dtype == 2:
            total = squares(table, items, item, start, size, row_length, tl.bfloat16, STRIDED, ALIGNED, BLOCKS, BLOCK)
    tl.store(parts + program, total * number(table, 8, items, item))
    if arrives_last(ticket, programs):
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, programs, BLOCK):
            index = first + tl.arange(0, BLOCK)
            sums += tl.load(parts + index, mask=index < programs, other=0, cache_modifier=".cg")
        tl.store(loss, tl.sum(sums, 0))


@triton.jit
def store_gradients(
    table, items, item, index, size, row_length, factor,
    DTYPE: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    inside = index < size
    gradient = factor * difference(table, items, item, index, inside, row_length, DTYPE, STRIDED, ALIGNED)
    first = entry(table, 9, items, item)
    second = entry(table, 10, items, item)
    if first != 0:
        tl.store(pointer(first, DTYPE, ALIGNED) + index, gradient.to(DTYPE), mask=inside)
    if second != 0:
        tl.store(pointer(second, DTYPE, ALIGNED) + index, (-gradient).to(DTYPE), mask=inside)


@triton.jit
def alignment_backward_kernel(
    table, grad, items,
    FLOAT32: tl.constexpr, FLOAT16: tl.constexpr, BFLOAT16: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    item = find_item(table, program, items, ITEMS)
    size = entry(table, 1, items, item).to(tl.int32)
    dtype = entry(table, 4, items, item)
    row_length = entry(table, 5, items, item).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    index = (program - entry(table, 0, items, item).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK)
    factor = 2.0 * tl.load(grad).to(tl.float32) * number(table, 8, items, item)
    if FLOAT32:
        if dtype == 0:
            store_gradients(table, items, item, index, size, row_length, factor, tl.float32, STRIDED, ALIGNED)
    if FLOAT16:
        if dtype == 1:
            store_gradients(table, items, item, index, size, row_length, factor, tl.float16, STRIDED, ALIGNED)
    if BFLOAT16:
        if dtype == 2:
            store_gradients(table, items, item, index, size, row_length, factor, tl.bfloat16, STRIDED, ALIGNED)


def supports_feature_alignment(features1: Sequence[Tensor], features2: Sequence[Tensor]) -> tuple[bool, str]:
    """Whether the kernels take these features, and if not, why."""
    if reason := misplaced("features1[0]", features1[0], interpreted(alignment_forward_kernel)):
        return False, reason
    device = features1[0].device
    for layer, (one, two) in enumerate(zip(features1, features2, strict=True)):
        if type(one) not in PLAIN or type(two) not in PLAIN:
            return False, f"features1[{layer}] or features2[{layer}] is a subclass of Tensor; plain ones are taken"
        if one.dtype not in DTYPE_CODES:
            return False, f"features1[{layer}] is {one.dtype}; the kernels take {dtype_names()}"
        if two.dtype != one.dtype:
            return False, f"features2[{layer}] is {two.dtype}, features1[{layer}] {one.dtype}"
        if one.device != device or two.device != device:
            return False, f"features1[{layer}] or features2[{layer}] is not on {device}"
        if one.numel() == 0:
            return False, f"features1[{layer}] is empty"
        if one.numel() > _LARGEST:
            return False, f"features1[{layer}] has {one.numel()} entries, at most {_LARGEST} are taken"
    return True, ""


def feature_alignment(features1: Sequence[Tensor], features2: Sequence[Tensor]) -> Tensor:
    """The sum over layers of the mean squared difference: float32 []."""
    pairs = _readable(features1, features2)
    device = features1[0].device
    with on_device(device):
        first, programs = first_programs([-(-one.numel() // (BLOCK * FORWARD_BLOCKS)) for one, _ in pairs])
        fields, constants = _described(pairs, first, ())
        loss = torch.empty((), dtype=torch.float32, device=device)
        parts = torch.empty(programs, dtype=torch.float32, device=device)
        tensors = (upload(fields, device), parts, ticket(device), loss)
        constants = (*constants, FORWARD_BLOCKS, BLOCK)
        scalars = (len(pairs), programs)
        Launch(
            alignment_forward_kernel, (programs, 1, 1), tensors, scalars, ("i32", "i32"), constants, NUM_WARPS, 1
        ).run()
    return loss


def feature_alignment_backward(
    grad: Tensor,
    features1: Sequence[Tensor],
    features2: Sequence[Tensor],
    grads1: Sequence[Tensor | None],
    grads2: Sequence[Tensor | None],
) -> None:
    """Writes the gradients that are wanted, contiguous and shaped like the features, for the gradient of the loss."""
    pairs = _readable(features1, features2)
    device = features1[0].device
    with on_device(device):
        first, programs = first_programs([-(-one.numel() // BLOCK) for one, _ in pairs])
        fields, constants = _described(pairs, first, (grads1, grads2))
        tensors = (upload(fields, device), grad)
        constants = (*constants, BLOCK)
        Launch(
            alignment_backward_kernel, (programs, 1, 1), tensors, (len(pairs),), ("i32",), constants, NUM_WARPS, 1
        ).run()


def _described(
    pairs: list[tuple[Tensor, Tensor]], first: list[int], gradients: Sequence[Sequence[Tensor | None]]
) -> tuple[list[list[int]], tuple[bool | int, ...]]:
    """The fields of the table, and the constants that follow from them."""
    sizes = [one.numel() for one, _ in pairs]
    codes = [DTYPE_CODES[one.dtype] for one, _ in pairs]
    layouts = [_rows_of(*pair) for pair in pairs]
    assert None not in layouts
    lengths, strides1, strides2 = (list(column) for column in zip(*layouts, strict=True))
    addresses = [
        [one.data_ptr() for one, _ in pairs],
        [two.data_ptr() for _, two in pairs],
        *([0 if tensor is None else tensor.data_ptr() for tensor in column] for column in gradients),
    ]
    strided = any(length < size for length, size in zip(lengths, sizes, strict=True))
    aligned = not any(value % ALIGNMENT for column in (sizes, *addresses) for value in column)
    factors = [bits_of(1 / size) for size in sizes]
    fields = [first, sizes, *addresses[:2], codes, lengths, strides1, strides2, factors, *addresses[2:]]
    return fields, (0 in codes, 1 in codes, 2 in codes, strided, aligned, padded_items(len(pairs)))


def _readable(features1: Sequence[Tensor], features2: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The features as the kernels step through them; what lies otherwise in memory is copied."""
    return [
        (one, two) if _rows_of(one, two) is not None else (one.contiguous(), two.contiguous())
        for one, two in zip(features1, features2, strict=True)
    ]


def _rows_of(one: Tensor, two: Tensor) -> tuple[int, int, int] | None:
    """The length of the rows in which both lie, and the distances from row to row."""
    if one.is_contiguous() and two.is_contiguous():
        return one.numel(), one.numel(), one.numel()
    layouts = [_rows(one), _rows(two)]
    if layouts[0] is None or layouts[1] is None:
        return None
    (length1, stride1), (length2, stride2) = layouts[0], layouts[1]
    length = min(length1, length2)
    if length1 == length2:
        return length, stride1, stride2
    if length1 == one.numel():
        return length, length, stride2
    if length2 == two.numel():
        return length, stride1, length
    return None


def _rows(tensor: Tensor) -> tuple[int, int] | None:
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    length = 1
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    if not dims:
        return length, length
    stride = expected = dims[-1][1]
    for size, found in reversed(dims):
        if found != expected:
            return None
        expected *= size
    return length, stride
