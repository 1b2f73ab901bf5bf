"""The five fine-grained data sets in the json splits of VPT (Jia et al. 2022), which the paper follows.

<root>/train.json, val.json, test.json      {"<image path>": <label>, ...}
<root>/images/, Images/ or <root> itself    what the paths are relative to, by data set:

CUB_200_2011    images/     001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg
nabirds         images/     0295/<uuid>.jpg
OxfordFlowers   .           jpg/image_00001.jpg
Stanford-dogs   Images/     n02085620-Chihuahua/n02085620_10074.jpg
Stanford-cars   .           cars_train/00001.jpg
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mosa_kernels.data.files import some
from mosa_kernels.data.lists import Listed, assemble, check_trained, dataset_of, is_number, is_path, locate, read_text
from mosa_kernels.data.published import FGVC
from mosa_kernels.data.splits import DataSplits

SPLITS = {"train": "train.json", "validation": "val.json", "test": "test.json"}
IMAGE_FOLDERS = {
    "CUB_200_2011": "images",
    "nabirds": "images",
    "OxfordFlowers": ".",
    "Stanford-dogs": "Images",
    "Stanford-cars": ".",
}
OTHER_FOLDERS = (".", "images", "Images", "jpg")
OBTAINED = (
    "The images come from the data set's own page, and train.json, val.json and test.json from the links in the "
    "README of VPT (github.com/KMnP/vpt); both go into the same folder"
)


def open_fgvc(address: str, *, root: str | Path | None = None, verify: bool = False) -> DataSplits:
    """Opens one of the 5 data sets.

    Labels of any kind are numbered in sorted order, as VPT does (NABirds' are class numbers with gaps).

    Args:
        address: the data set's folder; its name, or what precedes "=", is one of the names in use.
        root: what a relative address is relative to.
        verify: decode every image now.

    Raises:
        FileNotFoundError: the folder, a split or images are missing: which, where, and how they are obtained.
        ValueError: an unknown data set, a split that is not a JSON object of labels by path, or a number that is
            spelled in two ways.
    """
    folder, row = locate("fgvc", FGVC, address, root)
    missing = [name for name in SPLITS.values() if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found there. {OBTAINED}")
    raw = {split: read_labels(folder / name) for split, name in SPLITS.items()}
    names = sorted({label for labels in raw.values() for label in labels.values()}, key=_order)
    _check_spelling(folder, names)
    number = {name: position for position, name in enumerate(names)}
    lists = {
        split: Listed(folder / SPLITS[split], tuple(labels), tuple(number[label] for label in labels.values()))
        for split, labels in raw.items()
    }
    check_trained(lists["train"], names)
    images = _image_folder(folder, IMAGE_FOLDERS[row.name], lists["train"].paths[0])
    files = {split: dataset_of(listed, images, OBTAINED) for split, listed in lists.items()}
    shown = "its folder" if images == folder else f"{images.name}/"
    note = f"VPT's train, val and test lists, images in {shown}"
    return assemble(row, folder, files, names, note, verify=verify)


def _order(label: str) -> tuple[int, int, str]:
    """Numbers by value, then words."""
    return (0, int(label), label) if is_number(label) else (1, 0, label)


def _check_spelling(folder: Path, names: Sequence[str]) -> None:
    """Refuses labels in order of which two are the same number: they would be two classes.

    Raises:
        ValueError: there are; two of them are named.
    """
    for first, second in itertools.pairwise(names):
        if is_number(first) and is_number(second) and int(first) == int(second):
            raise ValueError(
                f"{folder}: expected one spelling of each label in {', '.join(SPLITS.values())}, got {first!r} and "
                f"{second!r}"
            )


class _Pairs(list[tuple[str, object]]):
    """A JSON object's pairs, unlike a JSON array; a dict would keep the last label of an image named twice."""


def read_labels(path: Path) -> dict[str, str]:
    """Reads a split: labels by image path.

    Raises:
        ValueError: it is not a JSON object of numbers or strings in UTF-8, is empty, names an image twice, or names
            what cannot be a path.
    """
    try:
        record = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else at line {error.lineno}") from error
    if not isinstance(record, _Pairs):
        raise ValueError(f"{path}: expected a JSON object of labels by image path, got {type(record).__name__}")
    if not record:
        raise ValueError(f"{path}: expected labels by image path, got an empty JSON object")
    twice = [name for name, count in Counter(name for name, _ in record).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: names images twice: {some(twice)}")
    for name, label in record:
        if not is_path(name):
            raise ValueError(f"{path}: expected paths of images, got {name!r}")
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise ValueError(f"{path}: expected a number or a name as the label of {name!r}, got {label!r}")
    return {name: str(label) for name, label in record}


def _image_folder(root: Path, usual: str, first: str) -> Path:
    """The folder that the paths are relative to: the data set's usual one, or another that people have."""
    tried = [root / usual, *(root / other for other in OTHER_FOLDERS if other != usual)]
    for folder in tried:
        if (folder / first).is_file():
            return folder
    places = ", ".join(str(folder / first) for folder in tried)
    raise FileNotFoundError(f"{root}: the first image of {SPLITS['train']} was looked for as {places}. {OBTAINED}")
