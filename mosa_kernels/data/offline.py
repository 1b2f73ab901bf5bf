"""The data sets that need no network and no file: "offline:<task>"."""

from __future__ import annotations

import numpy as np

from mosa_kernels.data import digits
from mosa_kernels.data.procedural import DRAWN_TASKS, DrawnTask
from mosa_kernels.data.splits import ArrayDataset, DataSplits, content_fingerprint

# As VTAB-1k: 800 images to train on, 200 to choose with. The source task is to be learned, not adapted to.
SIZES = {"train": 800, "validation": 200, "test": 3200}
SOURCE_SIZES = {"train": 20_000, "validation": 1600, "test": 3200}
# Of the tasks whose number of labels the user chooses.
FEW_VALIDATION, FEW_TEST = 1000, 3000
MOST_LABELS = digits.TRAINING_POOL
OFFLINE_TASKS = ("digits", *DRAWN_TASKS)
FEW_LABEL_TASKS = ("digits", *(name for name, task in DRAWN_TASKS.items() if task.few_labels))


def open_offline(task: str, *, seed: int = 0, image_size: int = 32, labels_per_class: int = 20) -> DataSplits:
    """Draws an offline task.

    Args:
        task: one of `OFFLINE_TASKS`.
        seed: of everything that is random in it.
        image_size: height and width of the images, in pixels.
        labels_per_class: training images a class, 1 to 60, for `FEW_LABEL_TASKS`; the others have 800 in all.

    Raises:
        ValueError: an unknown task, or a number out of range.
    """
    if task not in OFFLINE_TASKS:
        raise ValueError(f"offline task: expected one of {', '.join(OFFLINE_TASKS)}, got {task!r}")
    if not 16 <= image_size <= 512:
        raise ValueError(f"image_size: expected 16 to 512 pixels, got {image_size}")
    if task in FEW_LABEL_TASKS and not 1 <= labels_per_class <= MOST_LABELS:
        raise ValueError(f"labels_per_class: expected 1 to {MOST_LABELS}, got {labels_per_class}")
    if task == "digits":
        return _digits(seed, image_size, labels_per_class)
    return _drawn(DRAWN_TASKS[task], seed, image_size, labels_per_class)


def _drawn(task: DrawnTask, seed: int, image_size: int, labels_per_class: int) -> DataSplits:
    sizes = SOURCE_SIZES if task.name == "source" else SIZES
    chosen = ""
    if task.few_labels:
        sizes = {"train": len(task.classes) * labels_per_class, "validation": FEW_VALIDATION, "test": FEW_TEST}
        chosen = f"; {labels_per_class} labels a class"
    parts = {split: ArrayDataset(*task.draw(seed, split, np.arange(n), image_size)) for split, n in sizes.items()}
    return DataSplits(
        name=f"offline:{task.name}",
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        classes=task.classes,
        fingerprint=content_fingerprint(parts.values(), task.classes),
        note=f"drawn in memory at {image_size} pixels from seed {seed}; the splits are independent drawings{chosen}",
        label_preserving=task.label_preserving,
    )


def _digits(seed: int, image_size: int, labels_per_class: int) -> DataSplits:
    train, _ = digits.draw_digits("train", 10 * labels_per_class, labels_per_class, seed, image_size)
    validation, _ = digits.draw_digits("validation", FEW_VALIDATION, None, seed, image_size)
    test, _ = digits.draw_digits("test", FEW_TEST, None, seed, image_size)
    return DataSplits(
        name="offline:digits",
        train=train,
        validation=validation,
        test=test,
        classes=digits.CLASSES,
        fingerprint=content_fingerprint((train, validation, test), digits.CLASSES),
        note=(
            f"scikit-learn's handwritten digits drawn in colour at {image_size} pixels from seed {seed}; "
            f"{labels_per_class} labels a class; no original is shared between splits"
        ),
        label_preserving=digits.LABEL_PRESERVING,
    )
