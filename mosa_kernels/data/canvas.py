"""What the drawn tasks share: a pixel grid, backgrounds, clutter, colours that stand out, noise, the final uint8 image.

Positions are in [-1, 1] over the image, x to the right and y downwards, so that a task looks the same at every size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mosa_kernels.data.draws import Draws

Field = NDArray[np.float32]  # [B, H, W]
Images = NDArray[np.float32]  # [B, H, W, 3] in [0, 1]


@dataclass(frozen=True)
class Scenery:
    """What surrounds the objects of a task.

    Attributes:
        background: contrast of the background's texture, 0 for a plain colour.
        clutter: the largest number of distracting strokes (each image draws 0 to this many).
        noise: half-width of the uniform pixel noise, in [0, 1].
        candidates: colours drawn for an object, of which the one farthest from its surroundings is taken.
    """

    background: float = 0.35
    clutter: int = 4
    noise: float = 0.06
    candidates: int = 3


CLEAN = Scenery(background=0.0, clutter=0, noise=0.0)


def pixel_grid(size: int) -> tuple[Field, Field]:
    """Centres of the pixels, x and y float32 [1, size, size] in (-1, 1)."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return np.broadcast_to(axis[None, None, :], (1, size, size)), np.broadcast_to(axis[None, :, None], (1, size, size))


def column(values: NDArray[np.floating] | NDArray[np.integer]) -> Field:
    """[B] -> [B, 1, 1], to broadcast over pixels."""
    return values.astype(np.float32)[:, None, None]


def place(size: int, x: Field, y: Field, angle: Field, radius: Field) -> tuple[Field, Field]:
    """Object coordinates of every pixel, u and v float32 [B, size, size]; x, y, angle, radius are [B].

    The object's u axis is turned by `angle` (radians) from the image's x axis towards y (clockwise as seen).
    """
    grid_x, grid_y = pixel_grid(size)
    dx, dy = grid_x - column(x), grid_y - column(y)
    cos, sin = column(np.cos(angle) / radius), column(np.sin(angle) / radius)
    return cos * dx + sin * dy, cos * dy - sin * dx


def coverage(distance: Field, radius: Field, size: int) -> Field:
    """Share of each pixel that lies inside an outline, from the signed distance in units of `radius` [B]."""
    pixels = column(radius * (size / 2))
    return np.clip(np.float32(0.5) - distance * pixels, 0, 1)


def blend(images: Images, colour: NDArray[np.float32], alpha: Field) -> None:
    """Paints `colour` ([B, 3], or [B, H, W, 3]) over `images` in place, with opacity `alpha` [B, H, W]."""
    if colour.ndim == 2:
        colour = colour[:, None, None, :]
    images += alpha[..., None] * (colour - images)


def colour_apart(draws: Draws, others: NDArray[np.float32], candidates: int) -> NDArray[np.float32]:
    """A random colour [B, 3], of several candidates the farthest from every one of `others` [B, K, 3]."""
    offered = draws.uniform(0, 1, (candidates, 3))
    gap = np.abs(offered[:, :, None, :] - others[:, None, :, :]).sum(axis=-1).min(axis=-1)  # [B, candidates]
    return offered[np.arange(len(offered)), gap.argmax(axis=1)]


def two_colours_apart(
    draws: Draws, behind: NDArray[np.float32], candidates: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two colours [B, 3] for an object, far from the background's [B, 3] and from each other."""
    first = colour_apart(draws, behind[:, None], candidates)
    return first, colour_apart(draws, np.stack([behind, first], axis=1), candidates)


def scene(draws: Draws, size: int, scenery: Scenery) -> tuple[Images, NDArray[np.float32]]:
    """What is behind the objects, and its mean colours [B, 3]."""
    images, behind = background(draws, size, scenery.background)
    clutter(draws, images, scenery.clutter)
    return images, behind


def background(draws: Draws, size: int, contrast: float) -> tuple[Images, NDArray[np.float32]]:
    """A background with a smooth random texture; returns the images and their mean colours [B, 3]."""
    grid_x, grid_y = pixel_grid(size)
    colour = draws.uniform(0.05, 0.95, (3,))
    tint = draws.uniform(-0.5, 0.5, (3,)) * np.float32(contrast)
    pattern = np.zeros((len(draws), size, size), dtype=np.float32)
    for fastest in (2.0, 4.5, 9.0) if contrast > 0 else ():
        kx, ky = draws.uniform(-fastest, fastest), draws.uniform(-fastest, fastest)
        phase, weight = draws.uniform(0, 2 * np.pi), draws.uniform(0.2, 1)
        pattern += column(weight) * np.sin(column(kx) * grid_x + column(ky) * grid_y + column(phase))
    images = colour[:, None, None, :] + pattern[..., None] * tint[:, None, None, :]
    return np.clip(images, 0, 1, out=images), colour


def clutter(draws: Draws, images: Images, strokes: int) -> None:
    """Draws 0 to `strokes` short thin strokes of random colours over each image, in place."""
    size = images.shape[1]
    wanted = draws.integers(strokes + 1)
    for number in range(strokes):
        x, y = draws.uniform(-1, 1), draws.uniform(-1, 1)
        angle, half_length = draws.uniform(0, np.pi), draws.uniform(0.06, 0.3)
        half_width, colour = draws.uniform(0.025, 0.06), draws.uniform(0, 1, (3,))
        rows = np.flatnonzero(wanted > number)
        if not len(rows):
            continue
        u, v = place(size, x[rows], y[rows], angle[rows], np.ones(len(rows), dtype=np.float32))
        beyond = np.maximum(np.abs(u) - column(half_length[rows]), 0)
        alpha = np.clip((column(half_width[rows]) - np.hypot(beyond, v)) * np.float32(size / 2) + np.float32(0.5), 0, 1)
        painted = images[rows]
        blend(painted, colour[rows], alpha)
        images[rows] = painted


def finish(draws: Draws, images: Images, noise: float) -> NDArray[np.uint8]:
    """Adds pixel noise and rounds to uint8 [B, H, W, 3]."""
    if noise > 0:
        images += draws.uniform(-noise, noise, images.shape[1:])
    return (np.clip(images, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
