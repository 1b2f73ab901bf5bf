"""Another library's data set: its images as RGB, its labels as integers, and its files where it lists them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mosa_kernels.data.images import UNREADABLE, as_rgb, read_image


class RGBDataset:
    """Another library's data set, its images as RGB and its labels as integers.

    Args:
        dataset: items of (PIL image, label, ...).
        name: for messages.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        self.name = name
        self.files = _listed_files(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image as RGB and its label.

        Raises:
            ValueError: the image cannot be read, or the label is no integer; the item is named.
        """
        try:
            image, label = self._item(index)
            if not isinstance(image, Image.Image):
                raise ValueError(f"expected a PIL image, got {type(image).__name__}")
            image = as_rgb(image)
        except UNREADABLE as error:
            file = f" ({self.files[index]})" if self.files else ""
            raise ValueError(f"{self.name}: item {index}{file}: {error}") from error
        return image, _as_label(label, self.name, index)

    def _item(self, index: int) -> tuple[Any, Any]:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            image, label = self.dataset[index][:2]
            return image, label
        # timm's own item is the next one that can be read, with another label, where this one cannot.
        file, label = reader[index][:2]
        with file:
            return read_image(file), label


def _as_label(label: Any, name: str, index: int) -> int:
    try:
        number = int(label)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: item {index} has a label of type {type(label).__name__}; only classification data sets, with "
            "one integer an image, can be used"
        ) from error
    return number


def labels_of(dataset: RGBDataset) -> NDArray[np.int64]:
    """All labels, int64 [n]: from the data set's own list where it has one, else by reading every item."""
    listed = _listed_labels(dataset.dataset)
    if listed is not None and len(listed) == len(dataset):
        return np.array([_as_label(label, dataset.name, i) for i, label in enumerate(listed)], dtype=np.int64)
    return np.array([dataset[i][1] for i in range(len(dataset))], dtype=np.int64)


def _listed_labels(dataset: Any) -> Any:
    """The label list that the library keeps, if it does: reading every image for its label can take an hour."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            return getattr(dataset, attribute)
    reader: Any = getattr(dataset, "reader", None)  # timm's
    if hasattr(reader, "label_key") and hasattr(reader, "dataset"):
        return reader.dataset[reader.label_key]
    for attribute in ("samples", "_samples"):
        pairs = getattr(dataset, attribute, None)
        if pairs is not None and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            return [label for _, label in pairs]
    return None


def _listed_files(dataset: Any) -> list[Path] | None:
    """The file of each item, where the library keeps a list of them; it may hold pairs of file and label."""
    for attribute in ("_image_files", "_samples", "samples", "imgs", "_images"):
        listed = getattr(dataset, attribute, None)
        if not isinstance(listed, (list, tuple)) or len(listed) != len(dataset):
            continue
        files = [entry[0] if isinstance(entry, tuple) and entry else entry for entry in listed]
        if files and all(isinstance(file, (str, os.PathLike)) for file in files):
            return [Path(file) for file in files]
    return None
