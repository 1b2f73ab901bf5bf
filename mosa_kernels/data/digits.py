"""Real handwritten digits in colour: scikit-learn's bundled 8 x 8 scans, drawn in random pose over clutter.

The 1797 originals are divided once and for all, per class, into a pool for training, one for validation and one for
testing; no original ever appears in two of them, whatever the seed. The seed chooses which originals of the training
pool carry a label, and every drawing's pose, colours and surroundings.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mosa_kernels.data import canvas
from mosa_kernels.data.canvas import Scenery
from mosa_kernels.data.draws import Draws
from mosa_kernels.data.splits import ArrayDataset

CLASSES = tuple(str(digit) for digit in range(10))
TRAINING_POOL, VALIDATION_POOL = 60, 30  # originals a class; the remaining 84 to 93 are for testing
LABEL_PRESERVING = frozenset({"shift", "colour"})  # a mirrored digit is another sign
_CHUNK = 128
# Half the scan's side and the shift in units of half the image, the turn in radians. Chosen so that 20 labels a class
# leave room both above linear probing and below a perfect score: on the shipped backbone linear probing reaches 56 %,
# a dense adapter 67 %.
RADIUS, TURN, SHIFT = (0.8, 0.95), 0.12, 0.05
SCENERY = Scenery(background=0.2, clutter=2, noise=0.03, candidates=6)


@lru_cache(maxsize=1)
def originals() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The scans, float32 [1797, 8, 8] in [0, 1], and their labels int64 [1797].

    Raises:
        ModuleNotFoundError: scikit-learn, which carries the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "offline:digits needs scikit-learn, which carries the scans: pip install scikit-learn"
        ) from error
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


@lru_cache(maxsize=1)
def pools() -> dict[str, tuple[NDArray[np.int64], ...]]:
    """For each split, the numbers of the originals it may use, class by class."""
    labels = originals()[1]
    order = np.argsort(Draws(0, "digits/pools", np.arange(len(labels))).uniform(), kind="stable")
    by_class = [order[labels[order] == c] for c in range(10)]
    first, second = TRAINING_POOL, TRAINING_POOL + VALIDATION_POOL
    return {
        "train": tuple(members[:first] for members in by_class),
        "validation": tuple(members[first:second] for members in by_class),
        "test": tuple(members[second:] for members in by_class),
    }


def choose(split: str, count: int, per_class: int | None, seed: int) -> NDArray[np.int64]:
    """Which original each of `count` drawings shows, int64 [count]; drawing i shows a digit i modulo 10.

    Args:
        split: "train", "validation" or "test".
        count: number of drawings.
        per_class: how many originals a class to use, chosen by the seed; None for the whole pool.
        seed: of the choice and its order.
    """
    chosen = []
    for c, pool in enumerate(pools()[split]):
        order = Draws(seed, f"digits/{split}/choice", np.array([c])).permutation(len(pool))[0]
        chosen.append(pool[order[:per_class]])
    return np.array([chosen[i % 10][(i // 10) % len(chosen[i % 10])] for i in range(count)], dtype=np.int64)


def ink_at(scans: NDArray[np.float32], u: canvas.Field, v: canvas.Field) -> canvas.Field:
    """The scans [B, 8, 8] read at object coordinates [B, H, W] (the scan spans [-1, 1]), bilinearly; 0 outside."""
    padded = np.pad(scans, ((0, 0), (1, 1), (1, 1)))
    last = scans.shape[-1] + 1
    column, row = ((np.clip(c, -1.3, 1.3) + 1) * np.float32(4) + np.float32(0.5) for c in (u, v))
    column, row = np.clip(column, 0, last), np.clip(row, 0, last)
    left, top = np.minimum(column.astype(np.int64), last - 1), np.minimum(row.astype(np.int64), last - 1)
    right_share, low_share = column - left, row - top
    b = np.arange(len(scans))[:, None, None]
    upper = padded[b, top, left] * (1 - right_share) + padded[b, top, left + 1] * right_share
    lower = padded[b, top + 1, left] * (1 - right_share) + padded[b, top + 1, left + 1] * right_share
    return (upper * (1 - low_share) + lower * low_share).astype(np.float32)


def paint(draws: Draws, scans: NDArray[np.float32], size: int = 32, scenery: Scenery = SCENERY) -> NDArray[np.uint8]:
    """Draws each scan [B, 8, 8] once, uint8 [B, size, size, 3]."""
    images, behind = canvas.scene(draws, size, scenery)
    radius = draws.uniform(*RADIUS)
    angle = draws.uniform(-TURN, TURN)
    u, v = canvas.place(size, draws.uniform(-SHIFT, SHIFT), draws.uniform(-SHIFT, SHIFT), angle, radius)
    # The scans' soft grey edges become a stroke whose edge is about a pixel wide.
    alpha = np.clip((ink_at(scans, u, v) - np.float32(0.4)) * np.float32(3) + np.float32(0.5), 0, 1)
    canvas.blend(images, canvas.colour_apart(draws, behind[:, None], scenery.candidates), alpha)
    return canvas.finish(draws, images, scenery.noise)


def draw_digits(
    split: str, count: int, per_class: int | None, seed: int, size: int = 32, scenery: Scenery = SCENERY
) -> tuple[ArrayDataset, NDArray[np.int64]]:
    """`count` drawings of a split, and the number of the original that each of them shows, int64 [count]."""
    scans, labels = originals()
    chosen = choose(split, count, per_class, seed)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        draws = Draws(seed, f"digits/{split}", np.arange(part.start, part.stop))
        images[part] = paint(draws, scans[chosen[part]], size, scenery)
    return ArrayDataset(images, labels[chosen]), chosen
