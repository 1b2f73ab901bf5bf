"""How a call is cut into tiles of tokens that share one expert and fit into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import MERGED, AdapterArguments

TILE_BYTES = 1536 * 1024
"""Size of a tile of x: 512 tokens of ViT-B in float32.

Forward + backward of 64 x 197 tokens, d 768, r 64, one core, tiles of 384, 768, 1536, 3072, 6144, 12288 KiB: 154, 139,
136, 140, 144, 188 ms in float32, 93, 85, 84, 76, 82, 96 ms in bfloat16.
"""

MINIMUM_ROWS = 16

SHORT_RUN = 64
"""Mean tokens per run below which tokens are gathered by expert first.

Forward + backward of 4096 tokens in runs of 16, 32, 64, 128: 89, 65, 53, 49 ms as they are against 56 to 62 ms gathered
in float32, 116, 68, 48, 38 ms against 34 ms in bfloat16.
"""


class Tile(NamedTuple):
    start: int
    stop: int
    expert: int


class Plan(NamedTuple):
    tiles: list[Tile]  # sorted by expert
    order: Tensor | None  # int64 [T]: row t of the tiles is token order[t] of the call; None: as they are


def make_plan(args: AdapterArguments, tokens: int) -> Plan:
    """Tiles that cover all tokens, those of one expert next to each other in the list."""
    runs, order = _runs(args, tokens)
    rows = max(TILE_BYTES // (args.width * args.x.element_size()), MINIMUM_ROWS)
    return Plan([tile for run in sorted(runs, key=lambda run: run.expert) for tile in _cut(run, rows)], order)


def _runs(args: AdapterArguments, tokens: int) -> tuple[list[Tile], Tensor | None]:
    if not args.has_experts:
        return [Tile(0, tokens, MERGED)], None
    if args.expert is None:
        return [Tile(0, tokens, args.expert_id)], None
    listed = args.expert.tolist()
    ids: list[int] = listed if isinstance(listed, list) else [listed]
    length = tokens // len(ids)
    runs = _joined(ids, length)
    if tokens >= SHORT_RUN * len(runs) or len(runs) == len(set(ids)):
        return runs, None
    groups = torch.argsort(args.expert, stable=True)
    order = (groups.unsqueeze(1) * length + torch.arange(length, device=groups.device)).reshape(-1)
    return _joined(sorted(ids), length), order


def _joined(ids: list[int], length: int) -> list[Tile]:
    """Runs of `length` tokens for each id, neighbours of one expert made one."""
    runs: list[Tile] = []
    for group, expert in enumerate(ids):
        stop = (group + 1) * length
        if runs and runs[-1].expert == expert:
            runs[-1] = Tile(runs[-1].start, stop, expert)
        else:
            runs.append(Tile(group * length, stop, expert))
    return runs


def _cut(run: Tile, rows: int) -> Iterator[Tile]:
    """Parts of at most `rows` tokens and nearly equal size: a short last part would waste a whole round of calls."""
    tokens = run.stop - run.start
    parts = -(-tokens // rows)
    for part in range(parts):
        yield Tile(run.start + tokens * part // parts, run.start + tokens * (part + 1) // parts, run.expert)
