"""What a backend reads off an assignment once, and which units and tiles an expert owns anything of."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import MERGED, AdapterArguments
from mosa_kernels.backends.tickets import lasting

Found = TypeVar("Found")
_EXPERTS = 256  # that a byte can name


class _Entry(NamedTuple):
    source: weakref.ref[Tensor]
    version: int
    address: int
    found: object


class PerAssignment(Generic[Found]):
    """The answers of `make(assignment)`, each kept as long as its assignment lives and stays as it is.

    The first question about an assignment waits for the device, so that every stream may use the answer; later ones
    look it up. There is no answer while a CUDA graph is captured: the graph would keep the answer's address, and go on
    reading it when the assignment has changed, by loading a checkpoint, or is gone.
    """

    def __init__(self, make: Callable[[Tensor], Found | None]) -> None:
        self.make = make
        self.entries: dict[int, _Entry] = {}  # by the id of the assignment

    def of(self, assignment: Tensor) -> Found | None:
        if assignment.is_inference():  # whose changes leave no trace
            return None
        if assignment.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        key = id(assignment)
        entry = self.entries.get(key)
        if (
            entry is not None
            and entry.source() is assignment
            and entry.version == assignment._version
            and entry.address == assignment.data_ptr()
        ):
            return entry.found  # type: ignore[return-value]
        if entry is not None and assignment.is_cuda:  # another stream may still read the old answer
            torch.cuda.synchronize(assignment.device)
        found = lasting(lambda: self.make(assignment), assignment.device)
        if assignment.is_cuda:
            torch.cuda.current_stream(assignment.device).synchronize()
        source = weakref.ref(assignment, lambda _: self.entries.pop(key, None))
        self.entries[key] = _Entry(source, assignment._version, assignment.data_ptr(), found)
        return found


def of_experts(args: AdapterArguments) -> Tensor | None:
    """The assignment of a call of which some token may see one expert alone; None where there is no such call."""
    return None if args.expert is None and args.expert_id == MERGED else args.assignment


def owned_units(assignment: Tensor) -> Tensor:
    """Whether each id owns anything of each unit of an assignment [d, r]: bool [256, r] on the CPU. Waits."""
    units = torch.arange(assignment.shape[1], device=assignment.device)
    owned = torch.zeros(_EXPERTS, units.numel(), dtype=torch.bool, device=assignment.device)
    owned[assignment.long(), units] = True
    return owned.cpu()


def owned_tiles(assignment: Tensor, side: int) -> Tensor:
    """The same of square tiles: bool [256, ceil(d / side), ceil(r / side)] on the CPU. Waits."""
    rows, columns = (torch.arange(size, device=assignment.device) // side for size in assignment.shape)
    shape = (_EXPERTS, -(-rows.numel() // side), -(-columns.numel() // side))
    owned = torch.zeros(shape, dtype=torch.bool, device=assignment.device)
    owned[assignment.long(), rows[:, None], columns] = True
    return owned.cpu()


def unit_lists(owned: Tensor, size: int) -> Tensor:
    """The units of each expert from `owned_units`, int16 [experts, size] filled up with r, on the CPU."""
    r = owned.shape[1]
    owned = owned[: int(owned.any(1).nonzero().max()) + 1]
    lists = torch.where(owned, torch.arange(r, device=owned.device), r).sort(1).values[:, :size]
    return torch.nn.functional.pad(lists, (0, size - lists.shape[1]), value=r).to(torch.int16)
