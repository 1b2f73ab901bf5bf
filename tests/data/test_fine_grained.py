"""The fine-grained tasks: sides and petals are counted in the pictures, patterns are known by their symmetries."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull

from mosa_kernels.data import open_data
from mosa_kernels.data.canvas import CLEAN
from mosa_kernels.data.fine_grained import OUTLINES, SIDES, WEAVES, weave
from mosa_kernels.data.procedural import DRAWN_TASKS

SIZE = 160
PERIOD = 0.4


def object_mask(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each pixel is from the plain background, the colour of a corner, 0 to 1."""
    apart = np.abs(image.astype(np.float64) - image[0, 0]).sum(axis=-1)
    return apart / apart.max()


def ripples(mask: NDArray[np.float64]) -> int:
    """How often an outline goes out and in on its way round: the strongest frequency of its radius over the angle."""
    centre = ndimage.center_of_mass(mask)
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    reach = np.arange(0, SIZE / 2, 0.25)
    rows = centre[0] + np.sin(angles)[:, None] * reach
    columns = centre[1] + np.cos(angles)[:, None] * reach
    radius = ndimage.map_coordinates(mask, [rows, columns], order=1).sum(axis=1) * 0.25  # [720]
    strength = np.abs(np.fft.rfft(radius - radius.mean()))
    return int(strength[2:24].argmax() + 2)


def test_outlines_have_the_sides_or_petals_of_their_class() -> None:
    images, labels = DRAWN_TASKS["outlines"].draw(3, "t", np.arange(20 * len(OUTLINES)), SIZE, CLEAN)
    counted: set[int] = set()
    for image, label in zip(images, labels, strict=True):
        mask = object_mask(image)
        if (mask[[0, -1]] > 0.2).any() or (mask[:, [0, -1]] > 0.2).any():
            continue  # reaches beyond the image
        assert ripples(mask) == SIDES[label % len(SIDES)], OUTLINES[label]
        inside = mask > 0.5
        filled = inside.sum() / ConvexHull(np.argwhere(inside)).volume
        assert (filled > 0.97) if OUTLINES[label].endswith("sides") else (filled < 0.95), (OUTLINES[label], filled)
        counted.add(int(label))
    assert counted == set(range(len(OUTLINES)))


def pattern(name: str, u: NDArray[np.floating], v: NDArray[np.floating]) -> NDArray[np.float32]:
    """A pattern at points [H, W], its edges a tenth of a period wide."""
    label = np.array([WEAVES.index(name)])
    numbers = (np.full((1, 1, 1), value, dtype=np.float32) for value in (PERIOD, 3.0))
    return weave(label, u[None].astype(np.float32), v[None].astype(np.float32), *numbers)[0]


def grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of the unit square around the centre, none of them on it."""
    axis = np.linspace(-1, 1, 64) + 0.003
    u, v = np.meshgrid(axis, axis)
    return u, v


def turned(angle: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    u, v = grid()
    return np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v


def shifted(along: float, across: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    u, v = grid()
    return u + along * PERIOD, v + across * PERIOD


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("zigzag", shifted(1, 0)),
        ("zigzag", shifted(0, 1.3)),
        ("waves", shifted(1, 0)),
        ("waves", shifted(0, 2)),
        ("rings", turned(0.7)),
        ("rays", turned(np.pi / 4)),
        ("grid", grid()[::-1]),
        ("grid", shifted(1, 1)),
        ("bricks", shifted(1 / 1.6, 1 / 1.6)),  # half a brick along, a row further
        ("lozenges", grid()[::-1]),
        ("lozenges", shifted(0.5, 0.5)),
        ("fade", shifted(0, 0.3)),
    ],
)
def test_a_pattern_has_its_symmetry(name: str, moved: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    original, same = pattern(name, *grid()), pattern(name, *moved)
    assert original.std() > 0.2
    assert np.abs(original - same).mean() < 0.01
    others = [np.abs(pattern(other, *grid()) - pattern(other, *moved)).mean() for other in WEAVES if other != name]
    assert max(others) > 0.1  # a symmetry that every pattern has would say nothing


def test_patterns_differ() -> None:
    drawn = {name: pattern(name, *grid()) for name in WEAVES}
    for one in WEAVES:
        for other in WEAVES:
            assert one == other or np.abs(drawn[one] - drawn[other]).mean() > 0.2, (one, other)


def test_weaves_show_two_colours() -> None:
    images, labels = DRAWN_TASKS["weaves"].draw(2, "t", np.arange(80), SIZE, CLEAN)
    for image, label in zip(images, labels, strict=True):
        colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        order = np.argsort(counts)[::-1]
        flat = counts[order[2]] / counts[order[1]]  # of the object's two colours
        if WEAVES[label] == "fade":
            assert len(colours) > 60
        else:
            assert flat > 0.05, WEAVES[label]


@pytest.mark.parametrize("task", ["outlines", "weaves", "proportions", "hollows", "glyphs", "fills"])
def test_the_user_chooses_the_number_of_labels(task: str) -> None:
    few = open_data(f"offline:{task}", labels_per_class=5)
    assert len(few.train) == 5 * few.num_classes
    assert (len(few.validation), len(few.test)) == (1000, 3000)
    assert "5 labels a class" in few.note
    assert few.fingerprint != open_data(f"offline:{task}", labels_per_class=6).fingerprint
    with pytest.raises(ValueError, match=r"labels_per_class: expected 1 to 60, got 0"):
        open_data(f"offline:{task}", labels_per_class=0)
