"""What every reader returns: three datasets of (image, label), with what is needed to repeat a result."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mosa_kernels.data.draws import Draws

# Augmentations that a data set may declare to leave its labels right.
AUGMENTATIONS = frozenset({"crop", "flip", "shift", "colour"})


class ImageDataset(Protocol):
    """Images with integer labels: a PIL image (RGB) or a uint8 array [H, W, 3], and an int."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image | NDArray[np.uint8], int]: ...


class ArrayDataset:
    """Images in memory.

    Args:
        images: uint8 [n, H, W, 3].
        labels: integers [n].
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [n, H, W, 3], got {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: expected shape [{len(images)}], one an image, got {list(labels.shape)}")
        self.images = images
        self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


class SubsetDataset:
    """Some items of another dataset, with labels known beforehand.

    Args:
        dataset: where the items come from.
        indices: which items, in this order.
        labels: the label of each item of `indices`.
    """

    def __init__(self, dataset: ImageDataset, indices: NDArray[np.integer], labels: NDArray[np.integer]) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image | NDArray[np.uint8], int]:
        return self.dataset[int(self.indices[index])][0], int(self.labels[index])


@dataclass(frozen=True)
class DataSplits:
    """A data set, ready for training.

    Attributes:
        name: what the user asked for, without machine-dependent paths.
        train, validation, test: datasets of (PIL image or uint8 [H, W, 3], int label).
        classes: class names, in the order of the labels.
        fingerprint: SHA-256 over the content (in-memory data) or over file names, sizes and labels (files; over the
            labels alone of a torchvision or timm data set that does not list its files).
        note: how the data are stored and split, for the record that goes with every result.
        label_preserving: the augmentations (of `AUGMENTATIONS`) that leave the labels right.
        benchmark: "VTAB-1k", "FGVC", "GICD" or "": the part of the paper's Table 11 that it belongs to.
        differs: where its class count or split sizes are not those of Table 11, in words.
        validation_in_train: the validation images are trained on, too, so that no epoch can be chosen with them.
    """

    name: str
    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset
    classes: tuple[str, ...]
    fingerprint: str
    note: str
    label_preserving: frozenset[str] = AUGMENTATIONS
    benchmark: str = ""
    differs: tuple[str, ...] = ()
    validation_in_train: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(self.label_preserving - AUGMENTATIONS)
        if unknown:
            raise ValueError(f"label_preserving: expected some of {sorted(AUGMENTATIONS)}, got {unknown}")

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def summary(self) -> dict[str, object]:
        """What a result has to say about its data, ready for JSON."""
        return {
            "name": self.name,
            "classes": self.num_classes,
            "class_names": list(self.classes),
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "fingerprint": self.fingerprint,
            "note": self.note,
            "label_preserving": sorted(self.label_preserving),
            "differs_from_table_11": list(self.differs),
            "validation_in_train": self.validation_in_train,
        }


def content_fingerprint(datasets: Iterable[ArrayDataset], classes: Sequence[str]) -> str:
    """SHA-256 over class names, images and labels."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for dataset in datasets:
        digest.update(repr(dataset.images.shape).encode())
        digest.update(np.ascontiguousarray(dataset.images).data)
        digest.update(np.ascontiguousarray(dataset.labels.astype("<i8")).data)
    return digest.hexdigest()


def stratified_parts(
    labels: NDArray[np.integer], shares: Sequence[float], classes: Sequence[str], seed: int
) -> list[NDArray[np.int64]]:
    """Splits items at random into parts of the given shares, class by class.

    Every part gets at least one item of every class and the first part what remains.

    Args:
        labels: integers [n].
        shares: of the second, third, ... part; their sum is below 1.
        classes: class names, for the error message.
        seed: of the random order.

    Returns:
        The sorted indices of each part, the first one included.

    Raises:
        ValueError: the shares are not sensible, or a class has fewer items than there are parts.
    """
    if any(share <= 0 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"shares to hold out: expected positive numbers of sum below 1, got {list(shares)}")
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(len(shares) + 1)]
    held = Counter(np.asarray(labels).tolist())
    scarce = [f"{classes[c]} ({held[c]})" for c in range(len(classes)) if held[c] < len(parts)]
    if scarce:
        raise ValueError(
            f"a split into {len(parts)} parts needs at least {len(parts)} images of every class; too few: "
            + ", ".join(scarce[:10])
        )
    order = np.argsort(Draws(seed, "stratified", np.arange(len(labels))).uniform(), kind="stable")
    for c in range(len(classes)):
        members = order[np.asarray(labels)[order] == c]
        sizes = [max(1, round(share * len(members))) for share in shares]
        while sum(sizes) >= len(members):  # rounding up must not empty the first part
            sizes[int(np.argmax(sizes))] -= 1
        bounds = np.cumsum([0, *sizes, len(members) - sum(sizes)])
        for number in range(len(sizes) + 1):
            part = 0 if number == len(sizes) else number + 1
            parts[part].append(members[bounds[number] : bounds[number + 1]])
    return [np.sort(np.concatenate(part)) for part in parts]
