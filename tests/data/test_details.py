"""The tasks of `details.py`: proportions are measured, holes counted, letters told apart, fills have symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from mosa_kernels.data.canvas import CLEAN
from mosa_kernels.data.details import FILLS, GLYPHS, HOLLOWS, PROPORTIONS, RATIOS, fill, glyph, hollow
from mosa_kernels.data.procedural import DRAWN_TASKS

SIZE = 160
Mask = NDArray[np.bool_]
Points = NDArray[np.floating]


def object_masks(task: str, count: int) -> tuple[list[Mask], list[int]]:
    """Where the object is, in images of it alone; those that reach beyond the image are left out."""
    images, labels = DRAWN_TASKS[task].draw(3, "t", np.arange(count), SIZE, CLEAN)
    masks = []
    for image in images.astype(np.float64):
        apart = np.abs(image - image[0, 0]).sum(axis=-1)
        masks.append(apart > apart.max() / 2)
    inside = [n for n, mask in enumerate(masks) if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())]
    return [masks[n] for n in inside], [int(labels[n]) for n in inside]


def elongation(mask: Mask) -> float:
    """Length over width by the second moments: a/b of an ellipse, a box and a rhombus alike."""
    shares = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
    return float(np.sqrt(shares[1] / shares[0]))


def test_proportions_are_those_of_the_class() -> None:
    masks, labels = object_masks("proportions", 20 * len(RATIOS))
    assert set(labels) == set(range(len(PROPORTIONS)))
    for mask, label in zip(masks, labels, strict=True):
        assert elongation(mask) == pytest.approx(RATIOS[label], rel=0.06)
    filled = [mask.sum() / (4 * np.sqrt(np.linalg.det(np.cov(np.argwhere(mask).T)))) for mask in masks]
    # An ellipse has pi of that, a box 3, a rhombus 3 to the half times 2 / sqrt(2), nearly: three kinds in each class.
    assert max(filled) - min(filled) > 0.1


def test_hollows_have_the_holes_of_their_class() -> None:
    masks, labels = object_masks("hollows", 20 * len(HOLLOWS))
    assert set(labels) == set(range(len(HOLLOWS)))
    for mask, label in zip(masks, labels, strict=True):
        holes = ndimage.binary_fill_holes(mask) & ~mask
        number = ndimage.label(holes)[1]
        name = HOLLOWS[label]
        assert number == {"two": 2, "three": 3}.get(name, 1), name
        if number == 1:
            assert (elongation(holes) > 2) == (name == "slit"), name
            covered = holes.sum() / 4 / np.sqrt(np.linalg.det(np.cov(np.argwhere(holes).T)))
            assert (covered < 2.6) == (name == "plus"), (name, covered)


def plane() -> tuple[Points, Points]:
    """Points of a square around the centre, none of them on an axis."""
    axis = (np.arange(96) + 0.5) / 48 - 1
    u, v = np.meshgrid(axis, axis)
    return u, v


def turned(angle: float) -> tuple[Points, Points]:
    u, v = plane()
    return np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v


def letter(name: str, points: tuple[Points, Points]) -> Mask:
    u, v = (each[None].astype(np.float32) for each in points)
    return glyph(np.array([GLYPHS.index(name)]), u, v)[0] < 0


def test_no_letter_is_another_one_turned_or_mirrored() -> None:
    upright = {name: letter(name, plane()) for name in GLYPHS}
    for name in GLYPHS:
        assert np.hypot(*plane())[upright[name]].max() < 1  # fits into the unit disc
        assert upright[name].sum() > 200
        assert ndimage.label(upright[name])[1] == 1
        for angle in np.arange(0, 2 * np.pi, np.pi / 24):
            u, v = turned(float(angle))
            for moved in (letter(name, (u, v)), letter(name, (-u, v))):
                for other in GLYPHS:
                    alike = (moved & upright[other]).sum() / (moved | upright[other]).sum()
                    assert other == name or alike < 0.85, (name, other, alike)


def filled(name: str, points: tuple[Points, Points]) -> Mask:
    """Where a disc of radius 1 has its second colour."""
    u, v = (each[None].astype(np.float32) for each in points)
    inside = np.hypot(u, v) - np.float32(1)
    return ((fill(np.array([FILLS.index(name)]), inside, u, v) < 0) & (inside < 0))[0]


def mirrored(across_u: bool, across_v: bool) -> tuple[Points, Points]:
    u, v = plane()
    return (-u if across_u else u), (-v if across_v else v)


@pytest.mark.parametrize(
    ("name", "moved", "opposite"),
    [
        ("rim", turned(0.7), False),
        ("echo", turned(0.7), False),
        ("halves", mirrored(False, True), False),
        ("halves", mirrored(True, False), True),
        ("teeth", mirrored(False, True), False),
        ("quarters", mirrored(True, True), False),
        ("quarters", mirrored(True, False), True),
        ("belt", mirrored(True, False), False),
        ("saltire", turned(np.pi / 2), False),
        ("wedge", plane()[::-1], False),
    ],
)
def test_a_fill_has_its_symmetry(name: str, moved: tuple[Points, Points], opposite: bool) -> None:
    disc = np.hypot(*plane()) < 0.98
    same = (filled(name, plane()) == filled(name, moved)) != opposite
    assert same[disc].mean() > 0.97


def test_fills_and_hollows_differ_however_they_are_turned() -> None:
    disc = np.hypot(*plane()) < 0.98
    for name in FILLS:
        upright = filled(name, plane())
        assert 0.1 < upright[disc].mean() < 0.76
        for other in FILLS:
            for angle in np.arange(0, 2 * np.pi, np.pi / 12):
                apart = (upright != filled(other, turned(float(angle))))[disc].mean()
                assert other == name or min(apart, 1 - apart) > 0.04, (name, other, apart)
    u, v = (each[None].astype(np.float32) for each in plane())
    cut = {name: hollow(np.array([n]), u, v)[0] < 0 for n, name in enumerate(HOLLOWS)}
    assert all(np.hypot(*plane())[hole].max() < 0.65 for hole in cut.values())  # within the square
