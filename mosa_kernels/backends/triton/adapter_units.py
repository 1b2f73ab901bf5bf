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

from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.per_assignment import PerAssignment, of_experts, owned_units, unit_lists
from mosa_kernels.backends.triton.configs import padded

_NARROW = 64  # up to here the memory's bandwidth sets the time, and fewer products save none (counted, not measured)


def lists_for(args: AdapterArguments) -> Tensor | None:
    """The units of each expert, int16 [experts, padded size] filled up with r; None where that saves nothing.

    The first call for an assignment waits for the device (`PerAssignment`).
    """
    assignment = of_experts(args)
    return None if assignment is None or args.bottleneck <= _NARROW else _lists.of(assignment)


def make_lists(assignment: Tensor) -> Tensor | None:
    """`lists_for` of an assignment, uint8 [d, r]. Waits for the device."""
    owned = owned_units(assignment)
    size = padded(int(owned.sum(1).max()))
    return None if size >= padded(assignment.shape[1]) else unit_lists(owned, size).to(assignment.device)


_lists = PerAssignment(make_lists)
