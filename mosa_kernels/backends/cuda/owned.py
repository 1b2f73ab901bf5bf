"""What the CUDA kernels leave out (csrc/adapter.h, AdapterOwned): read off the assignment, whatever it was drawn as.

Share of a call's matrix products that is left for N = 4 experts at r = 128, with one expert for the tokens of a tile:

- "column", where an expert owns whole units of the bottleneck: 1/4 of both passes, the products of a bottleneck of
  r / N units. Only up to 64 units have such kernels, and at N = 3 they are padded from 43 to 64.
- "block": 1/4 of the products with w_up, 5/8 of the forward and 7/10 of the backward pass.
- "row": all. The output features of an expert lie scattered among the others': one in a hundred tiles of 16 x 16 has
  nothing of it. The forward pass could pack the 8 features of 32 that it owns into one tile in place of two, which
  leaves 3/4 of its products. But a warp has one such tile: packing would empty half of the warps, for a barrier and a
  shuffle of the output more in each step. The backward pass sums over all columns of dout, which reach shared memory by
  asynchronous copies of 16 bytes and would have to be packed there by elements.
- "element" and the even ones: all, without a table to look at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.per_assignment import PerAssignment, of_experts, owned_tiles, owned_units, unit_lists

NARROW = 64  # kNarrowRank: up to here the memory's bandwidth sets the time, and fewer products save none (counted)
LISTED = (32, 64)  # units that kernels with lists have
_TILE = 16
_WORTH = 0.75  # of the tiles owned by an expert on average; above, to look at the table costs about what it saves


class Owned(NamedTuple):
    """One of the two tables, on the device of the assignment."""

    units: Tensor | None  # int16 [experts, 32 or 64], filled up with r
    tiles: Tensor | None  # int16 [experts, ceil(d / 16)], a bit for each 16 units

    def described(self) -> tuple[int, int, int, int]:
        """As the bindings take it."""
        table = self.tiles if self.units is None else self.units
        assert table is not None
        address, experts = table.data_ptr(), table.shape[0]
        return (0, address, experts, 0) if self.units is None else (address, 0, experts, table.shape[1])


def owned_for(args: AdapterArguments) -> Owned | None:
    """None where every product is needed, or nearly so. The first call for an assignment waits (`PerAssignment`)."""
    if args.bottleneck <= NARROW:
        return None
    assignment = of_experts(args)
    return None if assignment is None else _owned.of(assignment)


def make_owned(assignment: Tensor) -> Owned | None:
    """`owned_for` of an assignment, uint8 [d, r]. Waits for the device."""
    units = owned_units(assignment)
    most = int(units.sum(1).max())
    size = next((listed for listed in LISTED if most <= listed), None)
    if size is not None:
        return Owned(unit_lists(units, size).to(assignment.device), None)
    experts = int(units.any(1).nonzero().max()) + 1
    tiles = owned_tiles(assignment, _TILE)[:experts]
    if float(tiles.float().mean()) > _WORTH:
        return None
    bits = (tiles.int() << torch.arange(tiles.shape[2], dtype=torch.int32)).sum(2)
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
    return Owned(None, signed.to(assignment.device))


_owned = PerAssignment(make_owned)
