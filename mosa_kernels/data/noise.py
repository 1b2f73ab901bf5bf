"""Wrong labels on purpose: how much a method believes what it is told."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosa_kernels.data.draws import Draws
from mosa_kernels.data.splits import ArrayDataset, DataSplits, ImageDataset


class ShiftedLabels:
    """The same images with other labels, read on demand.

    Args:
        dataset: the images and their right labels.
        shift: integers [n], added to the labels modulo `classes`.
        classes: how many there are.
    """

    def __init__(self, dataset: ImageDataset, shift: NDArray[np.integer], classes: int) -> None:
        self.dataset = dataset
        self.shift = shift
        self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[index]
        return image, (label + int(self.shift[index])) % self.classes


def with_label_noise(splits: DataSplits, share: float, seed: int) -> DataSplits:
    """Gives each training image a wrong label with probability `share`, any of the others alike; the rest stays right.

    Which images, and which labels, depends on the seed and the image's number alone.

    Args:
        splits: a data set.
        share: from 0 to 1.
        seed: of what is drawn.

    Raises:
        ValueError: the share is out of range, or there is no other class.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise: expected a share from 0 to 1, got {share}")
    if share == 0:
        return splits
    train, classes = splits.train, splits.num_classes
    if classes < 2:
        raise ValueError(f"label_noise: expected a data set of at least 2 classes, got {classes}")
    draws = Draws(seed, "label noise", np.arange(len(train)))
    shift = np.where(draws.uniform() < share, 1 + draws.integers(classes - 1), 0)
    noisy: ImageDataset = ShiftedLabels(train, shift, classes)
    if isinstance(train, ArrayDataset):
        noisy = ArrayDataset(train.images, (train.labels + shift) % classes)
    return dataclasses.replace(
        splits,
        train=noisy,
        fingerprint=hashlib.sha256(f"{splits.fingerprint}/{share}/{seed}".encode()).hexdigest(),
        note=f"{splits.note}; {np.count_nonzero(shift)} of {len(train)} training labels wrong, drawn from seed {seed}",
    )
