"""Four further fine-grained targets close to the source task, as those of `fine_grained.py`.

proportions   how long one plain ellipse, box or rhombus is for its width
hollows       which of six holes a disc or a square has
glyphs        one of ten letters, drawn in thick strokes and turned by any angle
fills         how an object of any shape shares its two colours
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mosa_kernels.data import canvas, shapes
from mosa_kernels.data.canvas import Field, Scenery, blend, column, coverage, place
from mosa_kernels.data.draws import Draws
from mosa_kernels.data.fine_grained import paint_plain, two_coloured

RATIOS = (1.0, 1.35, 1.8, 2.4, 3.2, 4.3)
PROPORTIONS = tuple(f"{ratio:g} to 1" for ratio in RATIOS)
HOLLOWS = ("round", "square", "slit", "plus", "two", "three")
HOLLOWED = ("disc", "square")
FILLED = ("disc", "square", "triangle", "star")
FILLS = ("rim", "echo", "halves", "teeth", "quarters", "belt", "saltire", "wedge")
_THICKNESS = np.float32(0.15)
_LONGEST = np.float32(0.92)
# Strokes from (u, v) to (u, v), u to the right and v downwards, within 0.8 of the centre.
_STROKES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "A": ((-0.5, 0.6, 0, -0.7), (0, -0.7, 0.5, 0.6), (-0.3, 0.2, 0.3, 0.2)),
    "E": ((-0.4, -0.65, -0.4, 0.65), (-0.4, -0.65, 0.45, -0.65), (-0.4, 0, 0.35, 0), (-0.4, 0.65, 0.45, 0.65)),
    "F": ((-0.4, -0.65, -0.4, 0.65), (-0.4, -0.65, 0.45, -0.65), (-0.4, 0, 0.35, 0)),
    "H": ((-0.45, -0.65, -0.45, 0.65), (0.45, -0.65, 0.45, 0.65), (-0.45, 0, 0.45, 0)),
    "K": ((-0.4, -0.65, -0.4, 0.65), (-0.35, 0.05, 0.45, -0.65), (-0.1, -0.15, 0.45, 0.65)),
    "L": ((-0.4, -0.65, -0.4, 0.65), (-0.4, 0.65, 0.45, 0.65)),
    "N": ((-0.45, 0.65, -0.45, -0.65), (-0.45, -0.65, 0.45, 0.65), (0.45, 0.65, 0.45, -0.65)),
    "T": ((-0.5, -0.6, 0.5, -0.6), (0, -0.6, 0, 0.7)),
    "V": ((-0.5, -0.65, 0, 0.65), (0, 0.65, 0.5, -0.65)),
    "Y": ((-0.5, -0.65, 0, 0), (0, 0, 0.5, -0.65), (0, 0, 0, 0.7)),
}
GLYPHS = tuple(_STROKES)


def proportion(label: NDArray[np.int64], kind: NDArray[np.integer], u: Field, v: Field) -> Field:
    """Signed distance, nearly: an ellipse (kind 0), a box (1) or a rhombus (2), `RATIOS[label]` as long as wide."""
    half = _LONGEST / column(np.array(RATIOS, dtype=np.float32)[label])
    long, wide = np.abs(u) / _LONGEST, np.abs(v) / half
    ellipse = (np.hypot(long, wide) - 1) * half
    box = np.maximum(np.abs(u) - _LONGEST * np.float32(0.85), np.abs(v) - half * np.float32(0.85))
    rhombus = (long + wide - 1) / np.hypot(1 / _LONGEST, 1 / half)
    chosen = column(kind)
    return np.where(chosen == 0, ellipse, np.where(chosen == 1, box, rhombus)).astype(np.float32, copy=False)


def hollow(label: NDArray[np.int64], u: Field, v: Field) -> Field:
    """Signed distance, nearly, of what is cut out of an object, negative there; labels are those of `HOLLOWS`."""
    third = np.float32(0.33 * np.sqrt(0.75))
    parts = {
        "round": np.hypot(u, v) - np.float32(0.4),
        "square": shapes.box(u, v, 0.36, 0.36),
        "slit": shapes.box(u, v, 0.54, 0.16),
        "plus": np.minimum(shapes.box(u, v, 0.51, 0.15), shapes.box(u, v, 0.15, 0.51)),
        "two": np.hypot(np.abs(u) - np.float32(0.31), v) - np.float32(0.22),
        "three": np.minimum(np.hypot(np.abs(u) - third, v - np.float32(0.165)), np.hypot(u, v + np.float32(0.33)))
        - np.float32(0.195),
    }
    return _of_class(label, parts)


def _of_class(label: NDArray[np.int64], parts: dict[str, Field]) -> Field:
    """Each image's own: the field in place `label[b]` for image b, float32 [B, H, W]."""
    chosen = [column(label) == number for number in range(len(parts))]
    return np.select(chosen, list(parts.values())).astype(np.float32, copy=False)


def glyph(label: NDArray[np.int64], u: Field, v: Field) -> Field:
    """Signed distance of the strokes of `GLYPHS[label]`."""
    out = np.empty_like(u)
    for number, strokes in enumerate(_STROKES.values()):
        rows = np.flatnonzero(label == number)
        if len(rows):
            near = [_from_stroke(stroke, u[rows], v[rows]) for stroke in strokes]
            out[rows] = np.minimum.reduce(near) - _THICKNESS
    return out


def _from_stroke(stroke: tuple[float, float, float, float], u: Field, v: Field) -> Field:
    """Distance of each point from a line segment."""
    u0, v0, u1, v1 = (np.float32(number) for number in stroke)
    du, dv = u1 - u0, v1 - v0
    along = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
    return np.hypot(u - u0 - along * du, v - v0 - along * dv).astype(np.float32, copy=False)


def fill(label: NDArray[np.int64], inside: Field, u: Field, v: Field) -> Field:
    """Signed distance, nearly, of the part that has the second colour, negative there; labels are those of `FILLS`.

    Args:
        label: index into `FILLS`, [B].
        inside: signed distance from the object's outline, [B, H, W].
        u, v: position from the object's centre, turned by the fill's angle, [B, H, W].
    """
    saw = np.abs(np.mod(v / np.float32(0.4), 1) - np.float32(0.5)) - np.float32(0.25)
    parts = {
        "rim": -np.float32(0.2) - inside,
        "echo": np.abs(inside + np.float32(0.3)) - np.float32(0.1),
        "halves": u,
        "teeth": u - saw * np.float32(0.6),
        "quarters": np.where(u * v < 0, -1, 1) * np.minimum(np.abs(u), np.abs(v)),
        "belt": np.abs(u) - np.float32(0.18),
        "saltire": np.minimum(np.abs(u), np.abs(v)) - np.float32(0.14),
        "wedge": np.maximum(-u, -v),
    }
    return _of_class(label, parts)


def paint_proportions(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> NDArray[np.uint8]:
    """One plain object; labels are those of `PROPORTIONS`."""
    kind = draws.integers(3)
    return paint_plain(draws, size, scenery, lambda u, v: proportion(label, kind, u, v))


def paint_hollows(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> NDArray[np.uint8]:
    """One plain object; labels are those of `HOLLOWS`."""
    body = draws.integers(len(HOLLOWED))
    turn = draws.uniform(0, 2 * np.pi)
    cos, sin = column(np.cos(turn)), column(np.sin(turn))

    def outline(u: Field, v: Field) -> Field:
        hole = hollow(label, cos * u + sin * v, cos * v - sin * u)
        return np.maximum(shapes.distance(HOLLOWED, body, u, v), -hole)

    return paint_plain(draws, size, scenery, outline)


def paint_glyphs(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> NDArray[np.uint8]:
    """One letter; labels are those of `GLYPHS`."""
    return paint_plain(draws, size, scenery, lambda u, v: glyph(label, u, v))


def paint_fills(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> NDArray[np.uint8]:
    """One object in two colours; labels are those of `FILLS`."""
    images, outline, x, y, radius, first, second = two_coloured(draws, size, scenery, FILLED)
    u, v = place(size, x, y, draws.uniform(0, 2 * np.pi), radius)
    blend(images, first, coverage(outline, radius, size))
    blend(images, second, coverage(np.maximum(outline, fill(label, outline, u, v)), radius, size))
    return canvas.finish(draws, images, scenery.noise)
