"""The units of the bottleneck that each expert owns anything of.

What an expert owns nothing of adds nothing to its output and receives no gradient: the kernels leave it out. An
assignment by whole units (``granularity="column"``) shrinks the bottleneck of an expert from r to r / N units, in both
projections and in both directions. This is read off the assignment itself, whatever it was drawn as. Other
granularities scatter an expert's entries over all units, and the kernels run as they do without lists:

- "element" and the even ones: every expert owns something of every tile.
- "block": 16 x 16 blocks. At r = 128 and N = 4, one in a hundred tiles of 32 columns by r is without an entry of the
  expert; of pieces of 32 x 32, a third, and products of that size are too small to keep the matrix units busy.
- "row": the output features of an expert lie scattered among those of the others. Of 64 neighbours it owns 16 on
  average and up to 28: a product padded to 32 would save half of the up-projection, a quarter of a forward pass, for a
  shuffle of the output through shared memory.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import MERGED, AdapterArguments
from mosa_kernels.backends.triton.configs import padded

_NARROW = 64  # up to here the memory's bandwidth sets the time, and fewer products save none (counted, not measured)


class _Entry(NamedTuple):
    source: weakref.ref[Tensor]
    version: int
    address: int
    lists: Tensor | None


_found: dict[int, _Entry] = {}  # by the id of the assignment


def lists_for(args: AdapterArguments) -> Tensor | None:
    """The units of each expert, int16 [experts, padded size] filled up with r; None where that saves nothing.

    The first call for an assignment waits for the device, later ones look the answer up. While a CUDA graph is being
    captured nothing may wait: an assignment that is met for the first time then goes without lists.
    """
    assignment = args.assignment
    if assignment is None or args.bottleneck <= _NARROW or (args.expert is None and args.expert_id == MERGED):
        return None
    if assignment.is_inference():  # whose changes leave no trace
        return None
    entry = _found.get(id(assignment))
    if (
        entry is not None
        and entry.source() is assignment
        and entry.version == assignment._version
        and entry.address == assignment.data_ptr()
    ):
        return entry.lists
    if assignment.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    key = id(assignment)
    lists = make_lists(assignment)
    source = weakref.ref(assignment, lambda _: _found.pop(key, None))
    _found[key] = _Entry(source, assignment._version, assignment.data_ptr(), lists)
    return lists


def make_lists(assignment: Tensor) -> Tensor | None:
    """`lists_for` of an assignment, uint8 [d, r]. Waits for the device."""
    r = assignment.shape[1]
    owned = torch.zeros(256, r, dtype=torch.bool, device=assignment.device)
    owned[assignment.long(), torch.arange(r, device=assignment.device)] = True
    owned = owned.cpu()
    size = padded(int(owned.sum(1).max()))
    if size >= padded(r):
        return None
    experts = int(owned.any(1).nonzero().max()) + 1
    units = torch.where(owned[:experts], torch.arange(r), r).sort(1).values[:, :size]  # [experts, size]
    return units.to(device=assignment.device, dtype=torch.int16)
