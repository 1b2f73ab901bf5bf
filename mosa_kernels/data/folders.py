"""Image folders: `train/`, `val/` and `test/` with one folder a class in each, or one flat folder of classes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mosa_kernels.data.splits import AUGMENTATIONS, DataSplits, ImageDataset, SubsetDataset, stratified_parts

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_NAMED = 10  # how many offenders an error names


class FileDataset:
    """Image files, read on demand.

    Args:
        paths: the files.
        labels: integers, one a file.
    """

    def __init__(self, paths: list[Path], labels: NDArray[np.integer]) -> None:
        self.paths = paths
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image as RGB and its label.

        Raises:
            ValueError: the file cannot be read as an image; its path is named.
        """
        return read_image(self.paths[index]), int(self.labels[index])


def read_image(path: Path) -> Image.Image:
    """Reads a file as an RGB image; a file that cannot be read is named."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def open_folder(
    path: str | Path,
    *,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    verify: bool = False,
) -> DataSplits:
    """Opens an image folder.

    With `train/` there has to be a `test/` (or a `val/`, which then serves as the test set); a missing validation set
    is held out of `train/`, class by class, from the seed. Without `train/` the folder's own subfolders are the
    classes, and all three sets are drawn from it. The note of the result says which of these happened.

    Args:
        path: the folder.
        seed: of the held-out parts.
        validation_share, test_share: shares to hold out where a set has no folder.
        verify: decode every image now rather than find a broken one in the middle of training.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: no classes, empty classes, classes that differ between the sets, no test set, unreadable images.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data: the folder {root} does not exist")
    folders = _split_folders(root)
    if "train" in folders:
        return _from_split_folders(root, folders, seed, validation_share, verify)
    if folders:
        raise ValueError(
            f"{root}: found {', '.join(sorted(f.name + '/' for f in folders.values()))} but no train/ folder"
        )
    return _from_flat_folder(root, seed, validation_share, test_share, verify)


def _split_folders(root: Path) -> dict[str, Path]:
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise ValueError(f"{root}: {present[0].name}/ and {present[1].name}/ both look like the {split} set")
        if present:
            found[split] = present[0]
    return found


def _class_folders(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: expected one subfolder a class, found none")
    return classes


def _files_of(folder: Path, classes: list[str], verify: bool) -> FileDataset:
    """The images of each class, in sorted order; empty classes and unreadable files are refused."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        files = [p for p in files if not p.name.startswith(".")]
        paths += files
        labels += [label] * len(files)
    held = Counter(labels)
    empty = [name for label, name in enumerate(classes) if not held[label]]
    if empty:
        raise ValueError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))}) in the class folders {some(empty)}")
    blank = [str(p) for p in paths if p.stat().st_size == 0]
    if blank:
        raise ValueError(f"{folder}: empty image files: {some(blank)}")
    if verify:
        check_readable(folder, paths)
    return FileDataset(paths, np.array(labels))


def check_readable(folder: Path, paths: list[Path]) -> None:
    """Decodes every image.

    Raises:
        ValueError: some cannot be read; they are named.
    """
    broken = []
    for path in paths:
        try:
            read_image(path)
        except ValueError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{folder}: {len(broken)} unreadable images: {some(broken)}")


def some(names: Sequence[object]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(map(str, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


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
            f"{root}: found train/ but neither test/ nor val/; a result needs images that were not trained on "
            "(give a test/ folder, or the folder of classes itself, which is then split)"
        )
    classes = _class_folders(folders["train"])
    for split, folder in folders.items():
        _check_same_classes(root, split, _class_folders(folder), classes)
    files = {split: _files_of(folder, classes, verify) for split, folder in folders.items()}
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
    files = _files_of(root, classes, verify)
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


def kinds_of(files: Iterable[FileDataset]) -> str:
    """How many files there are of each format."""
    suffixes = Counter(p.suffix.lower() for dataset in files for p in dataset.paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def files_fingerprint(root: Path, files: list[FileDataset], note: str) -> str:
    """SHA-256 over relative paths, sizes and labels, and over how the sets were made."""
    digest = hashlib.sha256(note.encode())
    for dataset in files:
        for path, label in zip(dataset.paths, dataset.labels.tolist(), strict=True):
            relative = Path(os.path.relpath(path, root)).as_posix()
            digest.update(f"{relative}\t{path.stat().st_size}\t{label}\n".encode())
    return digest.hexdigest()
