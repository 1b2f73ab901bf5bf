"""Image folders: `train/`, `val/` and `test/` with one folder a class in each, or one flat folder of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosa_kernels._files import expanded
from mosa_kernels.data.classes import refuse_one_class
from mosa_kernels.data.files import (
    SUFFIXES,
    FileDataset,
    check_disjoint,
    check_one_label,
    check_readable,
    files_fingerprint,
    images_below,
    kinds_of,
    look_up,
    some,
)
from mosa_kernels.data.splits import AUGMENTATIONS, DataSplits, ImageDataset, SubsetDataset, stratified_parts

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Folders of which none but these are found hold sets, not classes.
SPLIT_WORDS = {"trainval", "dev", "eval", "evaluation", "holdout"}.union(*SPLIT_FOLDERS.values())


def open_folder(
    path: str | Path,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    verify: bool = False,
) -> DataSplits:
    """Opens an image folder.

    With `train/` there has to be a `test/` (or a `val/`, which then serves as the test set), in whatever case they are
    written; a missing validation set is held out of `train/`, class by class, from the seed. Without `train/` the
    folder's own subfolders are the classes, and all three sets are drawn from it. The note of the result says which of
    these happened.

    Args:
        path: the folder.
        seed: of the held-out parts.
        validation_share, test_share: shares to hold out where a set has no folder.
        verify: decode every image now rather than find a broken one in the middle of training.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: no classes or a single one, empty classes, classes that differ between the sets, no test set,
            images in two of the sets or two of the classes, or twice in what is split, unreadable images.
    """
    root = expanded(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data: the folder {root} does not exist")
    folders = _split_folders(root)
    if "train" in folders:
        return _from_split_folders(root, folders, seed, validation_share, verify)
    if folders:
        raise ValueError(
            f"{root}: found {', '.join(sorted(f.name + '/' for f in folders.values()))} but no train/ folder; a class "
            "cannot have such a name"
        )
    return _from_flat_folder(root, seed, validation_share, test_share, verify)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the sets, whatever the case of their names."""
    found: dict[str, Path] = {}
    split_of = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    for folder in sorted(entry for entry in root.iterdir() if entry.name.lower() in split_of and entry.is_dir()):
        split = split_of[folder.name.lower()]
        if split in found:
            raise ValueError(f"{root}: {found[split].name}/ and {folder.name}/ both look like the {split} set")
        found[split] = folder
    return {split: found[split] for split in SPLIT_FOLDERS if split in found}


def has_every_set(path: str | Path) -> bool:
    """Whether a folder has a training, a validation and a test set, so that nothing is drawn from a seed."""
    root = expanded(path)
    return root.is_dir() and _split_folders(root).keys() == SPLIT_FOLDERS.keys()


def refuse_sets_as_classes(source: object, classes: Sequence[str]) -> None:
    """Refuses classes that are all called as sets are: what was read is a folder of sets, not of classes.

    Raises:
        ValueError: they are.
    """
    if all(name.lower() in SPLIT_WORDS for name in classes):
        raise ValueError(
            f"{source}: expected classes, got folders that look like sets: {some(classes)}; give a folder with "
            "train/ and test/, each with one subfolder a class"
        )


def refuse_one_folder(source: object, classes: Sequence[str]) -> None:
    """Refuses a single class: what was read holds the data set, or has no classes.

    Raises:
        ValueError: there is one.
    """
    refuse_one_class(source, classes, "one subfolder each", "where the data set lies in it, give that folder")


def _class_folders(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: expected one subfolder a class, found none")
    return classes


def _files_of(folder: Path, classes: list[str]) -> FileDataset:
    """The images of each class, in sorted order; empty classes and files are refused."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = images_below(folder / name)
        paths += files
        labels += [label] * len(files)
    held = Counter(labels)
    empty = [name for label, name in enumerate(classes) if not held[label]]
    if empty:
        raise ValueError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in the class folders {some(empty)}")
    return FileDataset(paths, np.array(labels), look_up(folder, paths))


def _check_same_classes(root: Path, split: str, found: list[str], expected: list[str]) -> None:
    extra, absent = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if extra or absent:
        difference = [f"only in {split}: {some(extra)}"] if extra else []
        difference += [f"only in train: {some(absent)}"] if absent else []
        raise ValueError(f"{root}: the classes of train and {split} differ ({'; '.join(difference)})")


def _from_split_folders(
    root: Path, folders: dict[str, Path], seed: int, validation_share: float, verify: bool
) -> DataSplits:
    if "test" not in folders and "validation" not in folders:
        raise ValueError(
            f"{root}: found {folders['train'].name}/ but neither test/ nor val/; a result needs images that were not "
            "trained on (give a test/ folder, or the folder of classes itself, which is then split; a class cannot be "
            "called so)"
        )
    classes = _class_folders(folders["train"])
    for split, folder in folders.items():
        _check_same_classes(root, split, _class_folders(folder), classes)
    refuse_one_folder(folders["train"], classes)
    files = {split: _files_of(folder, classes) for split, folder in folders.items()}
    pairs = [("train", "test"), ("validation", "test"), ("train", "validation")]
    check_disjoint(files, pairs)
    for split, dataset in files.items():
        check_one_label(folders[split], dataset, to_be_split=split == "train" and len(files) < len(SPLIT_FOLDERS))
    if verify:
        check_readable(root, files.values())
    train: ImageDataset = files["train"]
    if "test" in files and "validation" in files:
        validation: ImageDataset = files["validation"]
        test = files["test"]
        note = "its own train, validation and test folders"
    else:
        kept, held = stratified_parts(files["train"].labels, [validation_share], classes, seed)
        train, validation = (_subset(files["train"], part) for part in (kept, held))
        test = files["test"] if "test" in files else files["validation"]
        used = folders["test"] if "test" in files else folders["validation"]
        note = f"{used.name}/ is the test set; validation is {validation_share:g} of train/, held out with seed {seed}"
    return _splits(root, train, validation, test, classes, list(files.values()), note)


def _from_flat_folder(root: Path, seed: int, validation_share: float, test_share: float, verify: bool) -> DataSplits:
    classes = _class_folders(root)
    refuse_sets_as_classes(root, classes)
    refuse_one_folder(root, classes)
    files = _files_of(root, classes)
    check_one_label(root, files, to_be_split=True)
    if verify:
        check_readable(root, [files])
    parts = stratified_parts(files.labels, [validation_share, test_share], classes, seed)
    train, validation, test = (_subset(files, part) for part in parts)
    note = (
        f"one folder of classes, split by class with seed {seed}: "
        f"validation {validation_share:g}, test {test_share:g}, the rest to train"
    )
    return _splits(root, train, validation, test, classes, [files], note)


def _subset(files: FileDataset, part: NDArray[np.int64]) -> SubsetDataset:
    return SubsetDataset(files, part, files.labels[part])


def _splits(
    root: Path,
    train: ImageDataset,
    validation: ImageDataset,
    test: ImageDataset,
    classes: list[str],
    files: list[FileDataset],
    note: str,
) -> DataSplits:
    return DataSplits(
        name=f"folder:{root.resolve().name}",
        train=train,
        validation=validation,
        test=test,
        classes=tuple(classes),
        fingerprint=files_fingerprint(root, files, note),
        note=f"image files ({kinds_of(files)}); {note}",
        label_preserving=AUGMENTATIONS,
    )
