"""Bytes and products of an adapter call, counted.

With A the bytes of x and H those of the bottleneck. Forward: a fused kernel reads x and the residual and writes the
output, 3A. Eager PyTorch's LayerNorm, linear, gelu, linear, scale and two additions move 12A + 4H; torch.compile,
which does not fuse two matrix products, 8A + 4H, and with max-autotune's epilogues 6A + 3H. Backward: at least dout and
x are read and dx is written, 3A. The CPU kernels do just that, since what they read twice is a tile in the cache; in
two launches (dx, then the weight gradients) it is 5A + 4H; eager 15A + 8H, compiled 13A + 8H or, at best, 10A + 8H.
"""

from __future__ import annotations

import torch

from mosa_kernels.bench.case import COMPILE, COMPILE_MAX, DENSE_COPIES, EAGER, Work
from mosa_kernels.bench.shapes import Point

FLOOR = "floor"
MERGED_DENSE = "merged dense"

_FORWARD = {
    FLOOR: (3, 0),
    EAGER: (12, 4),
    DENSE_COPIES: (12, 4),
    COMPILE: (8, 4),
    COMPILE_MAX: (6, 3),
    MERGED_DENSE: (10, 4),  # the scale is folded into the weight
    "cpu": (3, 0),
    "triton": (3, 0),
    "cuda": (3, 0),
}
_BACKWARD = {
    FLOOR: (3, 0),
    EAGER: (15, 8),
    DENSE_COPIES: (15, 8),
    COMPILE: (13, 8),
    COMPILE_MAX: (10, 8),
    "cpu": (3, 0),
    "triton": (5, 4),
    "cuda": (5, 4),
}
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS, _RECOMPUTED = 2, 4, 1


def adapter_work(provider: str, direction: str, point: Point) -> Work | None:
    """What a provider moves and computes in "forward", "backward" or "both"; None where nobody has counted.

    A row of the floor counts the products without recomputation.
    """
    if direction == "both":
        parts = [adapter_work(provider, one, point) for one in ("forward", "backward")]
        counted = [part for part in parts if part is not None]
        if len(counted) < 2:
            return None
        return Work(sum(part.bytes for part in counted), sum(part.flops for part in counted))
    table = _FORWARD if direction == "forward" else _BACKWARD
    if provider not in table:
        return None
    of_x, of_bottleneck = table[provider]
    size = point.torch_dtype.itemsize
    activations = point.tokens * point.width * size
    bottleneck = point.tokens * point.bottleneck * size
    entries = point.width * point.bottleneck
    weights = 2 * entries * size + entries  # both projections, and the owners of one
    if direction == "backward":
        weights += 2 * entries * size
    products = _FORWARD_PRODUCTS if direction == "forward" else _BACKWARD_PRODUCTS
    if direction == "backward" and provider in ("cpu", "triton", "cuda"):
        products += _RECOMPUTED
    return Work(
        point.layers * (of_x * activations + of_bottleneck * bottleneck + weights),
        point.layers * products * 2 * point.tokens * entries,
    )


def training_state(provider: str, point: Point) -> int:
    """Bytes of weights, gradients, two moments, and owners or masks, all of the point's dtype but the last two."""
    entries, copies = point.width * point.bottleneck, point.experts if provider == DENSE_COPIES else 1
    trained = entries + point.bottleneck + 2 * point.width + copies * entries + point.experts * point.width
    masks = copies * entries * (torch.int64.itemsize if provider == DENSE_COPIES else torch.uint8.itemsize)
    return point.layers * (4 * trained * point.torch_dtype.itemsize + masks)
