"""Image files on disk: those that are named have to be there, and none may be in two sets, or have two labels."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mosa_kernels.data.images import read_image
from mosa_kernels.data.splits import ImageDataset

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
NAMED = 10  # how many offenders an error names


class Found(NamedTuple):
    """What the disk says of a file.

    Attributes:
        size: bytes.
        identity: the same for all names of one file, whatever links of either kind lead to it.
    """

    size: int
    identity: tuple[int, int] | str


class FileDataset:
    """Image files, read on demand.

    Args:
        paths: the files.
        labels: integers, one a file.
        found: one a file, as `look_up` gives them.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.integer], found: Sequence[Found]) -> None:
        self.paths = paths
        self.labels = np.asarray(labels, dtype=np.int64)
        self.found = found

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image as RGB and its label.

        Raises:
            ValueError: the file cannot be read as an image; its path is named.
        """
        return read_image(self.paths[index]), int(self.labels[index])


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, in sorted order; hidden files and folders are left out.

    Links are followed, but no folder is entered twice, nor one that holds `folder`: its images are of other classes.

    Raises:
        OSError: a subfolder cannot be read.
    """
    found = []
    entered = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        place = os.path.realpath(parent)
        if place in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".") and _has_image_suffix(name)]
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def look_up(source: object, paths: Sequence[Path], advice: str = "") -> list[Found]:
    """What the disk says of each file.

    Args:
        source: what names the files, for the message.
        paths: the files.
        advice: where missing ones come from, for the message.

    Raises:
        FileNotFoundError: some are missing; some of these are named.
        ValueError: some are empty.
    """
    files = [_look_up(path) for path in paths]
    missing = [str(path) for path, file in zip(paths, files, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(paths)} images that it lists are missing: {some(missing)}"
            + (f". {advice}" if advice else "")
        )
    found = [file for file in files if file is not None]
    empty = [str(path) for path, file in zip(paths, found, strict=True) if file.size == 0]
    if empty:
        raise ValueError(f"{source}: empty image files: {some(empty)}")
    return found


def _look_up(path: Path) -> Found | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    # Some file systems number no files; a real path tells all but hard links.
    return Found(found.st_size, (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path))


def check_readable(source: object, datasets: Iterable[ImageDataset]) -> None:
    """Decodes every image.

    Raises:
        ValueError: some cannot be read; they are named.
    """
    broken = []
    for dataset in datasets:
        for index in range(len(dataset)):
            try:
                dataset[index]
            except ValueError as error:
                broken.append(str(error))
    if broken:
        raise ValueError(f"{source}: {len(broken)} unreadable images: {some(broken)}")


def check_disjoint(files: Mapping[str, FileDataset], pairs: Iterable[tuple[str, str]]) -> None:
    """Refuses a file that is in two sets, however it is spelled and whatever links lead to it.

    Args:
        files: by set.
        pairs: of sets that must not share a file; one that is not in `files` is passed over.

    Raises:
        ValueError: some are; they are named.
    """
    paths = {
        split: {file.identity: path for file, path in zip(dataset.found, dataset.paths, strict=True)}
        for split, dataset in files.items()
    }
    for first, second in pairs:
        both = sorted(str(path) for file, path in paths.get(first, {}).items() if file in paths.get(second, {}))
        if both:
            raise ValueError(f"{len(both)} images are in both the {first} and the {second} set: {some(both)}")


def check_one_label(source: object, dataset: FileDataset, *, to_be_split: bool) -> None:
    """Refuses a file that a set holds with two labels; of a set that is to be split, one that it holds twice.

    Args:
        source: what was read, for the message.
        dataset: the set.
        to_be_split: what is there twice may be trained on and tested with; else it is only seen more often.

    Raises:
        ValueError: there are such files; two of the paths to each are named.
    """
    first: dict[object, int] = {}
    wrong = []
    for index, file in enumerate(dataset.found):
        before = first.setdefault(file.identity, index)
        if before != index and (to_be_split or dataset.labels[before] != dataset.labels[index]):
            wrong.append(f"{dataset.paths[before]} and {dataset.paths[index]}")
    if wrong:
        once = "each image once, as they are split" if to_be_split else "each image in one class"
        raise ValueError(f"{source}: expected {once}, got {len(wrong)} under two names: {some(wrong)}")


def placed(paths: Sequence[Path]) -> Iterator[str]:
    """Where each path lies: its folder without links and "..", and its name."""
    folders: dict[str, str] = {}
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in folders:  # files are many, folders few: a real path asks the disk about each of its parts
            folders[parent] = os.path.realpath(parent)
        yield os.path.join(folders[parent], name)


def some(names: Sequence[object], count: int | None = None) -> str:
    """The first few of many names, and how many more there are.

    Args:
        names: all, or the first `NAMED`.
        count: of all; None: the names are all.
    """
    count = len(names) if count is None else count
    return ", ".join(map(str, names[:NAMED])) + (f" and {count - NAMED} more" if count > NAMED else "")


def kinds_of(files: Iterable[FileDataset]) -> str:
    """How many files there are of each format."""
    suffixes = Counter(p.suffix.lower() for dataset in files for p in dataset.paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def files_fingerprint(root: Path, files: Iterable[FileDataset], note: str) -> str:
    """SHA-256 over relative paths, sizes and labels, and over how the sets were made.

    Raises:
        ValueError: a relative path is not UTF-8; it is named.
    """
    digest = hashlib.sha256(note.encode())
    folders: dict[str, str] = {}
    for dataset in files:
        for path, file, label in zip(dataset.paths, dataset.found, dataset.labels.tolist(), strict=True):
            parent, name = os.path.split(path)
            if parent not in folders:
                folders[parent] = os.path.relpath(parent, root)
            relative = Path(folders[parent], name).as_posix()
            try:
                digest.update(f"{relative}\t{file.size}\t{label}\n".encode())
            except UnicodeEncodeError as error:
                raise ValueError(f"expected names of files and folders in UTF-8, got {str(path)!r}") from error
    return digest.hexdigest()
