"""The drawn tasks: labels are measured from the pictures, by means that know nothing of how they were drawn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull

from mosa_kernels.data.canvas import CLEAN
from mosa_kernels.data.procedural import BINS, DRAWN_TASKS, LOCATION_RANGE

SIZE = 96


def object_mask(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each pixel is from the plain background (the commonest colour), 0 to 1, [H, W]."""
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    apart = np.abs(image.astype(np.float64) - colours[counts.argmax()]).sum(axis=-1)
    return apart / max(apart.max(), 1)


def touches_border(mask: NDArray[np.float64]) -> bool:
    inside = mask > 0.2
    return bool(inside[[0, -1]].any() or inside[:, [0, -1]].any())


def direction(mask: NDArray[np.float64]) -> float:
    """From the notch of an arrowhead (its convex hull without itself) to its body, in degrees clockwise."""
    hull_points = np.argwhere(mask > 0.5)
    hull_points = hull_points[ConvexHull(hull_points).vertices]
    picture = Image.new("L", mask.shape[::-1])
    ImageDraw.Draw(picture).polygon([(x, y) for y, x in hull_points.tolist()], fill=1)
    notch = np.clip(np.array(picture) - mask, 0, 1)
    body, hollow = (np.array(ndimage.center_of_mass(part)) for part in (mask, notch))
    return float(np.degrees(np.arctan2(*(body - hollow))) % 360)


@pytest.mark.parametrize("name", DRAWN_TASKS)
def test_a_task_is_a_function_of_seed_stream_and_index(name: str) -> None:
    task = DRAWN_TASKS[name]
    images, labels = task.draw(5, "train", np.arange(150))
    again, _ = task.draw(5, "train", np.array([149, 3]))
    np.testing.assert_array_equal(again, images[[149, 3]])
    for seed, stream in ((6, "train"), (5, "test")):
        other, same_labels = task.draw(seed, stream, np.arange(150))
        np.testing.assert_array_equal(labels, same_labels)
        assert (other != images).any(axis=(1, 2, 3)).all()
    assert images.dtype == np.uint8
    assert images.shape == (150, 32, 32, 3)


@pytest.mark.parametrize("name", DRAWN_TASKS)
@pytest.mark.parametrize("size", [24, 32, 57])
def test_sizes_and_balance(name: str, size: int) -> None:
    task = DRAWN_TASKS[name]
    images, labels = task.draw(0, "train", np.arange(2 * len(task.classes)), size)
    assert images.shape[1:] == (size, size, 3)
    assert (np.bincount(labels) == 2).all()
    assert images.std(axis=(1, 2, 3)).min() > 3  # nothing is blank


def test_location_is_the_centre_of_mass() -> None:
    images, labels = DRAWN_TASKS["location"].draw(1, "t", np.arange(160), SIZE, CLEAN)
    for image, label in zip(images, labels, strict=True):
        mask = object_mask(image)
        centre = (mask.sum(axis=0) * (np.arange(SIZE) + 0.5)).sum() / mask.sum() * 2 / SIZE - 1
        assert int((centre / LOCATION_RANGE + 1) / 2 * BINS) == label


def test_orientation_is_where_the_arrowhead_points() -> None:
    reference = Image.new("L", (200, 200))
    corners = [(0.95, 0.0), (-0.7, 0.65), (-0.2, 0.0), (-0.7, -0.65)]
    ImageDraw.Draw(reference).polygon([(100 + 90 * x, 100 + 90 * y) for x, y in corners], fill=1)
    assert (direction(np.array(reference, dtype=np.float64)) + 180) % 360 - 180 == pytest.approx(0, abs=1.5)
    images, labels = DRAWN_TASKS["orientation"].draw(1, "t", np.arange(192), 128, CLEAN)
    masks = [object_mask(image) for image in images]
    whole = [(direction(mask), label) for mask, label in zip(masks, labels, strict=True) if not touches_border(mask)]
    assert len(whole) > 96
    assert {label for _, label in whole} == set(range(16))
    for angle, label in whole:
        # Drawn within 9 degrees of the bin's middle; a neighbouring bin's drawing would be 13.5 or more away.
        assert abs((angle - (label + 0.5) * 360 / BINS + 180) % 360 - 180) < 13


def test_count_is_the_number_of_separate_objects() -> None:
    images, labels = DRAWN_TASKS["count"].draw(1, "t", np.arange(160), SIZE, CLEAN)
    for image, label in zip(images, labels, strict=True):
        _, pieces = ndimage.label(object_mask(image) > 0.1, structure=np.ones((3, 3)))
        assert pieces == label + 1


def test_source_shapes_have_their_holes_and_hollows() -> None:
    task = DRAWN_TASKS["source"]
    names = [task.classes[c].split() for c in range(len(task.classes))]
    images, labels = task.draw(1, "t", np.arange(32 * 6), SIZE, CLEAN)
    seen: dict[str, list[float]] = {}
    for image, label in zip(images, labels, strict=True):
        texture, shape = names[label]
        mask = object_mask(image)
        if texture != "plain" or touches_border(mask):
            continue
        inside = mask > 0.5
        holes = ndimage.label(~inside)[1] - 1
        assert holes == (1 if shape == "ring" else 0), shape
        filled = inside.sum() / ConvexHull(np.argwhere(inside)).volume
        seen.setdefault(shape, []).append(filled)
    assert set(seen) == {shape for _, shape in names}
    for shape, filled in seen.items():
        convex = shape in ("disc", "square", "bar", "triangle")
        assert (min(filled) > 0.95) if convex else (max(filled) < 0.85), (shape, filled)


def test_source_textures_show_two_colours_or_one() -> None:
    task = DRAWN_TASKS["source"]
    images, labels = task.draw(2, "t", np.arange(128), SIZE, CLEAN)
    for image, label in zip(images, labels, strict=True):
        counts = np.sort(np.unique(image.reshape(-1, 3), axis=0, return_counts=True)[1])[::-1]
        plain = task.classes[label].startswith("plain")
        # Background and first colour are flat areas; the second colour is one too where there is a pattern.
        share = counts[2] / counts[1]
        assert (share < 0.05) if plain else (share > 0.05), task.classes[label]
