"""One launch over many tensors: a table of their addresses and sizes on the device.

The table is int64 [fields, items]. Its first field is the number of the first program that works on an item.
"""

# mypy: disallow-incomplete-defs=False
from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.tickets import capturing
from mosa_kernels.backends.triton.capture import unrestricted

_RESERVE = 1 << 16  # numbers in pinned memory, for some hundred captures of a few hundred tensors each

_reserve: Tensor | None = None
_reserve_used = 0
_kept: list[Tensor] = []


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The launcher launches on the current device: this makes it the one of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def upload(fields: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The table on the device, int64 [fields, items], enqueued on the current stream; the host does not wait.

    A graph under capture copies the table again whenever it is replayed, from memory that is therefore never reused.
    """
    global _reserve, _reserve_used
    table = torch.tensor(fields, dtype=torch.int64, device="cpu")  # whatever the default device is
    if device.type != "cuda":
        return table
    if not capturing(device):
        if _reserve is None:  # ahead of a capture, where not every driver may pin memory
            _reserve = _pinned(_RESERVE)
        return table.pin_memory().to(device, non_blocking=True)
    if _reserve is None or _reserve_used + table.numel() > _reserve.numel():
        _reserve, _reserve_used = _pinned(max(_RESERVE, table.numel())), 0
    source = _reserve[_reserve_used : _reserve_used + table.numel()].view(table.shape)
    _reserve_used += table.numel()
    return source.copy_(table).to(device, non_blocking=True)


def _pinned(numbers: int) -> Tensor:
    with unrestricted():
        memory = torch.empty(numbers, dtype=torch.int64, device="cpu", pin_memory=True)
    keep(memory)
    return memory


def keep(tensor: Tensor) -> None:
    """Keeps memory that a captured graph reads."""
    _kept.append(tensor)


def first_programs(programs: Sequence[int]) -> tuple[list[int], int]:
    """The first program of each item that takes so many, and the number of all."""
    first, total = [], 0
    for count in programs:
        first.append(total)
        total += count
    return first, total


def bits_of(value: float) -> int:
    """A float32 as a table holds it."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def padded_items(items: int) -> int:
    """The power of two for `find_item`."""
    return max(16, 1 << (items - 1).bit_length())


@triton.jit
def find_item(table, program, items, ITEMS: tl.constexpr):
    """The item that a program works on."""
    index = tl.arange(0, ITEMS)
    first = tl.load(table + index, mask=index < items, other=1 << 40)
    return tl.sum((first <= program).to(tl.int32), 0) - 1


@triton.jit
def entry(table, field, items, item):
    """A number of the table: int64."""
    return tl.load(table + field * items + item)


@triton.jit
def number(table, field, items, item):
    """A number of the table that lies there by the bits of a float32."""
    return entry(table, field, items, item).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements of this type; ALIGNED promises a multiple of 16 bytes, which allows wide loads."""
    typed = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        typed = tl.multiple_of(typed, 16)
    return typed


@triton.jit
def arrives_last(ticket, programs):
    """Whether all other programs that share this ticket have come here before.

    What they wrote before is visible to the last one, and what they read they have read. The ticket is zero again.
    """
    tl.debug_barrier()  # all threads of this program are done, of which one takes the ticket
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    last = arrived == programs - 1
    tl.store(ticket, 0, mask=last)
    return last
