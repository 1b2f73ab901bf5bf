"""The drawn tasks: a source task to pre-train on, structured targets in the manner of VTAB, and fine-grained ones.

    source        32 classes: 8 shapes x 4 textures, in random colour, pose and clutter
    location      the horizontal position of one object, in 16 bins
    orientation   the direction in which an arrowhead points, in 16 bins of 22.5 degrees
    count         how many objects there are, 1 to 8
    outlines      how many sides or petals an object has; see `fine_grained.py`
    weaves        which pattern an object has; likewise
    proportions   how long an object is for its width; see `details.py`
    hollows       which hole a disc or a square has; likewise
    glyphs        which letter it is; likewise
    fills         how an object shares its two colours; likewise

Every task is a function of (seed, stream name, image index): see `draws.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mosa_kernels.data import canvas, details, fine_grained, shapes
from mosa_kernels.data.canvas import Scenery, blend, column, coverage, place
from mosa_kernels.data.draws import Draws

BINS = 16
LOCATION_RANGE = 0.76  # objects' centres lie in [-range, range] of the image's [-1, 1]: whole objects stay inside
LARGEST_COUNT = 8
# Within this share of a bin, so that no two classes touch: a label is never a matter of a hundredth of a pixel.
BIN_SHARE = 0.8
# Shapes whose centre of mass is their centre.
BALANCED = ("disc", "ring", "square", "bar", "cross", "triangle", "star")
SOLID = ("disc", "square", "triangle", "cross", "star")

# The targets are for adapting to with 800 images: what surrounds the objects is kept quieter than in the source task,
# so that linear probing on the shipped backbone stays well below adapters: count 60 and 89 %, location 29 and 53 %,
# orientation 42 and 76 %.
TARGET_SCENERY = Scenery(background=0.15, clutter=0, noise=0.03, candidates=6)

Drawing = NDArray[np.uint8]  # [B, H, W, 3]
Painter = Callable[[Draws, NDArray[np.int64], int, Scenery], Drawing]
_CHUNK = 128  # images drawn at once: their fields stay in cache


def _within_bin(draws: Draws, label: NDArray[np.int64]) -> NDArray[np.float32]:
    """A place in [0, 1) of the range that 16 bins divide, inside the inner part of the label's bin, [B]."""
    half = BIN_SHARE / 2
    return (label + np.float32(0.5) + draws.uniform(-half, half)).astype(np.float32) / np.float32(BINS)


def paint_source(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> Drawing:
    """One large textured shape; label = shape * 4 + texture."""
    shape, pattern = label // len(shapes.TEXTURES), label % len(shapes.TEXTURES)
    images, behind = canvas.scene(draws, size, scenery)
    radius = draws.uniform(0.38, 0.8)
    x, y = draws.uniform(-0.45, 0.45), draws.uniform(-0.45, 0.45)
    angle = draws.uniform(0, 2 * np.pi)
    u, v = place(size, x, y, angle, radius)
    alpha = coverage(shapes.distance(tuple(shapes.SHAPES), shape, u, v), radius, size)
    first, second = canvas.two_colours_apart(draws, behind, scenery.candidates)
    # The pattern is turned by its own angle, and its period is given in pixels of the image: 5 to 8 of 32.
    period = draws.uniform(0.31, 0.5)
    pu, pv = place(size, x, y, draws.uniform(0, 2 * np.pi), period)
    soft = column(period * (size / 2 / np.pi))
    mixed = shapes.texture(pattern, pu, pv, np.ones_like(soft), soft)
    paint = first[:, None, None, :] + mixed[..., None] * (second - first)[:, None, None, :]
    blend(images, paint, alpha)
    return canvas.finish(draws, images, scenery.noise)


def paint_location(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> Drawing:
    """One small plain object whose centre lies in vertical strip `label` of 16."""
    images, behind = canvas.scene(draws, size, scenery)
    x = (_within_bin(draws, label) * 2 - 1) * np.float32(LOCATION_RANGE)
    y = draws.uniform(-LOCATION_RANGE, LOCATION_RANGE)
    radius = draws.uniform(0.15, 0.24)
    u, v = place(size, x, y, draws.uniform(0, 2 * np.pi), radius)
    outline = shapes.distance(BALANCED, draws.integers(len(BALANCED)), u, v)
    colour = canvas.colour_apart(draws, behind[:, None], scenery.candidates)
    blend(images, colour, coverage(outline, radius, size))
    return canvas.finish(draws, images, scenery.noise)


def paint_orientation(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> Drawing:
    """An arrowhead pointing to angle (label + 0.5) * 22.5 degrees, clockwise from the right, within its bin."""
    images, behind = canvas.scene(draws, size, scenery)
    angle = _within_bin(draws, label) * np.float32(2 * np.pi)
    radius = draws.uniform(0.35, 0.7)
    x, y = draws.uniform(-0.35, 0.35), draws.uniform(-0.35, 0.35)
    u, v = place(size, x, y, angle, radius)
    colour = canvas.colour_apart(draws, behind[:, None], scenery.candidates)
    blend(images, colour, coverage(shapes.dart(u, v), radius, size))
    return canvas.finish(draws, images, scenery.noise)


def paint_count(draws: Draws, label: NDArray[np.int64], size: int, scenery: Scenery) -> Drawing:
    """label + 1 objects of one colour that do not touch, each in its own cell of a 3 x 3 grid, jittered."""
    images, behind = canvas.scene(draws, size, scenery)
    cells = draws.permutation(9)
    colour = canvas.colour_apart(draws, behind[:, None], scenery.candidates)
    for number in range(LARGEST_COUNT):
        radius = draws.uniform(0.2, 0.28)
        room = np.float32(1 / 3 - 0.03) - radius  # what keeps neighbours about a pixel apart
        x = (cells[:, number] % 3 - 1) * np.float32(2 / 3) + draws.uniform(-1, 1) * room
        y = (cells[:, number] // 3 - 1) * np.float32(2 / 3) + draws.uniform(-1, 1) * room
        angle, kind = draws.uniform(0, 2 * np.pi), draws.integers(len(SOLID))
        rows = np.flatnonzero(number <= label)
        if not len(rows):
            continue
        u, v = place(size, x[rows], y[rows], angle[rows], radius[rows])
        outline = shapes.distance(SOLID, kind[rows], u, v)
        painted = images[rows]
        blend(painted, colour[rows], coverage(outline, radius[rows], size))
        images[rows] = painted
    return canvas.finish(draws, images, scenery.noise)


@dataclass(frozen=True)
class DrawnTask:
    """A procedural task.

    Attributes:
        name: as in "offline:<name>".
        classes: class names, in the order of the labels.
        paint: draws images [B, H, W, 3] for given labels.
        label_preserving: the augmentations that leave the label right ("flip", "shift", "colour").
        scenery: what surrounds the objects.
        few_labels: whether the user says how many training images a class has.
    """

    name: str
    classes: tuple[str, ...]
    paint: Painter
    label_preserving: frozenset[str]
    scenery: Scenery = field(default_factory=Scenery)
    few_labels: bool = False

    def draw(
        self, seed: int, stream: str, indices: NDArray[np.integer], size: int = 32, scenery: Scenery | None = None
    ) -> tuple[Drawing, NDArray[np.int64]]:
        """Draws the images of the given indices: uint8 [B, size, size, 3], and their labels int64 [B].

        Labels go round the classes (index modulo their number): any run of indices is balanced. Images do not depend
        on which others are drawn.
        """
        numbers = np.asarray(indices).astype(np.int64)
        labels: NDArray[np.int64] = numbers % len(self.classes)
        images = np.empty((len(numbers), size, size, 3), dtype=np.uint8)
        for start in range(0, len(numbers), _CHUNK):
            part = slice(start, start + _CHUNK)
            draws = Draws(seed, f"{self.name}/{stream}", numbers[part])
            images[part] = self.paint(draws, labels[part], size, self.scenery if scenery is None else scenery)
        return images, labels


DRAWN_TASKS: dict[str, DrawnTask] = {
    task.name: task
    for task in (
        DrawnTask(
            "source",
            tuple(f"{texture} {shape}" for shape in shapes.SHAPES for texture in shapes.TEXTURES),
            paint_source,
            frozenset({"flip", "shift", "colour"}),
        ),
        DrawnTask(
            "location", tuple(f"column {i}" for i in range(BINS)), paint_location, frozenset({"colour"}), TARGET_SCENERY
        ),
        DrawnTask(
            "orientation",
            tuple(f"{(i + 0.5) * 360 / BINS:g} degrees" for i in range(BINS)),
            paint_orientation,
            frozenset({"shift", "colour"}),
            TARGET_SCENERY,
        ),
        DrawnTask(
            "count",
            tuple(str(i + 1) for i in range(LARGEST_COUNT)),
            paint_count,
            frozenset({"flip", "colour"}),
            TARGET_SCENERY,
        ),
        *(
            DrawnTask(
                name, classes, paint, frozenset({"flip", "shift", "colour"}), fine_grained.SCENERY, few_labels=True
            )
            for name, classes, paint in (
                ("outlines", fine_grained.OUTLINES, fine_grained.paint_outlines),
                ("weaves", fine_grained.WEAVES, fine_grained.paint_weaves),
                ("proportions", details.PROPORTIONS, details.paint_proportions),
                ("hollows", details.HOLLOWS, details.paint_hollows),
                ("glyphs", details.GLYPHS, details.paint_glyphs),
                ("fills", details.FILLS, details.paint_fills),
            )
        ),
    )
}
