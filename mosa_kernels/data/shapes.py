"""Shapes as signed distances and textures as soft masks, in the object's own coordinates.

A shape is a function of (u, v) [B, H, W], the pixel positions relative to the object's centre in units of its radius;
it returns the (approximate) signed distance to the outline, negative inside. Every shape fits into the unit disc.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]  # [B, H, W]
Shape = Callable[[Field, Field], Field]


def box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height))


def disc(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - np.float32(0.85)


def ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - np.float32(0.72)) - np.float32(0.24)


def square(u: Field, v: Field) -> Field:
    return box(u, v, 0.7, 0.7)


def bar(u: Field, v: Field) -> Field:
    return box(u, v, 0.94, 0.32)


def cross(u: Field, v: Field) -> Field:
    return np.minimum(box(u, v, 0.94, 0.29), box(u, v, 0.29, 0.94))


def triangle(u: Field, v: Field) -> Field:
    """Equilateral, its centre of mass at the origin."""
    slanted = np.float32(np.sqrt(0.75)) * np.abs(u) + np.float32(0.5) * v
    return np.maximum(slanted, -v) - np.float32(0.5)


def star(u: Field, v: Field) -> Field:
    """Five points: the plane is folded onto one tenth, where the outline is one straight edge."""
    fifth = np.float32(2 * np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(u, v), fifth) - fifth / 2)  # 0 in a notch, pi/5 at a point
    radius = np.hypot(u, v)
    tip = np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    notch = np.array([0.42, 0.0])
    edge = tip - notch
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    return x * np.float32(normal[0]) + y * np.float32(normal[1]) - np.float32(notch @ normal)


def crescent(u: Field, v: Field) -> Field:
    return np.maximum(np.hypot(u, v) - np.float32(0.92), np.float32(0.72) - np.hypot(u - np.float32(0.5), v))


def dart(u: Field, v: Field) -> Field:
    """An arrowhead that points to +u: tip (0.95, 0), corners (-0.7, +-0.65), a notch at (-0.2, 0).

    No rotation maps it to itself.
    """
    sides = np.float32(0.3666) * (u - np.float32(0.95)) + np.float32(0.9304) * np.abs(v)
    back = np.float32(0.7926) * (-u - np.float32(0.2)) - np.float32(0.6097) * np.abs(v)
    return np.maximum(sides, back)


SHAPES: dict[str, Shape] = {
    "disc": disc,
    "ring": ring,
    "square": square,
    "bar": bar,
    "cross": cross,
    "triangle": triangle,
    "star": star,
    "crescent": crescent,
}
TEXTURES = ("plain", "stripes", "checks", "dots")


def distance(names: tuple[str, ...], chosen: NDArray[np.integer], u: Field, v: Field) -> Field:
    """Signed distance of each image's own shape: `names[chosen[b]]` for image b, float32 [B, H, W]."""
    out = np.empty_like(u)
    for number, name in enumerate(names):
        rows = np.flatnonzero(chosen == number)
        if len(rows):
            out[rows] = SHAPES[name](u[rows], v[rows])
    return out


def texture(chosen: NDArray[np.integer], u: Field, v: Field, period: Field, sharpness: Field) -> Field:
    """How much of the second colour shows at each pixel, in [0, 1], float32 [B, H, W].

    Args:
        chosen: index into `TEXTURES`, [B].
        u, v: object coordinates, [B, H, W].
        period: of the pattern, in the units of u and v, [B, 1, 1].
        sharpness: slope of the pattern's soft edges, one over the pattern's change within about a pixel, [B, 1, 1].
    """
    out = np.zeros_like(u)
    wave = np.float32(2 * np.pi) / period
    for number, name in enumerate(TEXTURES):
        rows = np.flatnonzero(chosen == number)
        if name == "plain" or not len(rows):
            continue
        a = np.sin(wave[rows] * u[rows])
        if name == "stripes":
            level = a
        else:
            b = np.sin(wave[rows] * v[rows])
            level = a * b * np.float32(1.6) if name == "checks" else (a + b) - np.float32(0.55)
        out[rows] = np.clip(level * sharpness[rows] + np.float32(0.5), 0, 1)
    return out
