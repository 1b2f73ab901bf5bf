"""A folder of small pictures whose classes can be learnt: three shapes in random colours on a plain ground."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 5, "val": 3, "test": 4}
SIZE = 32


def shapes() -> dict[str, np.ndarray]:
    """Masks [32, 32] by class."""
    down, across = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    square = np.maximum(abs(down), abs(across)) < 0.75
    return {
        "cross": square & (np.minimum(abs(down), abs(across)) < 0.22),
        "disc": down**2 + across**2 < 0.5,
        "stripes": square & (np.sin(across * 16) > 0),
    }


def make_pictures(root: Path, counts: Mapping[str, int] = COUNTS) -> Path:
    """Writes train/val/test folders of PNGs, so many a class, and returns their root."""
    noise = np.random.default_rng(0)
    for split, count in counts.items():
        for name, mask in shapes().items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                dark, light = noise.uniform(0, 90, 3), noise.uniform(160, 255, 3)
                pixels = np.where(mask[..., None], light, dark) + noise.normal(0, 6, (SIZE, SIZE, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root
