"""Image files on disk: those that are named have to be there, and none may be in two sets."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mosa_kernels.data.images import read_image
from mosa_kernels.data.splits import ImageDataset

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
_NAMED = 10  # how many offenders an error names


class FileDataset:
    """Image files, read on demand.

    Args:
        paths: the files.
        labels: integers, one a file.
        sizes: bytes, one a file, as `file_sizes` gives them.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.integer], sizes: Sequence[int]) -> None:
        self.paths = paths
        self.labels = np.asarray(labels, dtype=np.int64)
        self.sizes = sizes

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


def file_sizes(source: object, paths: Sequence[Path], advice: str = "") -> list[int]:
    """Bytes of each file.

    Args:
        source: what names the files, for the message.
        paths: the files.
        advice: where missing ones come from, for the message.

    Raises:
        FileNotFoundError: some are missing; some of these are named.
        ValueError: some are empty.
    """
    sizes = [_size(path) for path in paths]
    missing = [str(path) for path, size in zip(paths, sizes, strict=True) if size is None]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(paths)} images that it lists are missing: {some(missing)}"
            + (f". {advice}" if advice else "")
        )
    empty = [str(path) for path, size in zip(paths, sizes, strict=True) if size == 0]
    if empty:
        raise ValueError(f"{source}: empty image files: {some(empty)}")
    return [size for size in sizes if size is not None]


def _size(path: Path) -> int | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


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


def check_disjoint(files: Mapping[str, Sequence[Path]], pairs: Iterable[tuple[str, str]]) -> None:
    """Refuses a file that is in two sets, however it is spelled and whatever links lead to it.

    Args:
        files: by set.
        pairs: of sets that must not share a file; one that is not in `files` is passed over.

    Raises:
        ValueError: some are; they are named.
    """
    places = {split: dict(zip(_real(paths), paths, strict=True)) for split, paths in files.items()}
    for first, second in pairs:
        both = sorted(str(places[first][place]) for place in places.get(first, {}) if place in places.get(second, {}))
        if both:
            raise ValueError(f"{len(both)} images are in both the {first} and the {second} set: {some(both)}")


def placed(paths: Sequence[Path]) -> Iterator[str]:
    """Where each path lies: its folder without links and "..", and its name."""
    folders: dict[str, str] = {}
    for path in paths:
        parent, name = os.path.split(path)
        if parent not in folders:  # files are many, folders few: a real path asks the disk about each of its parts
            folders[parent] = os.path.realpath(parent)
        yield os.path.join(folders[parent], name)


def _real(paths: Sequence[Path]) -> list[str]:
    return [os.path.realpath(place) if os.path.islink(place) else place for place in placed(paths)]


def some(names: Sequence[object]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(map(str, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def kinds_of(files: Iterable[FileDataset]) -> str:
    """How many files there are of each format."""
    suffixes = Counter(p.suffix.lower() for dataset in files for p in dataset.paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def files_fingerprint(root: Path, files: Iterable[FileDataset], note: str) -> str:
    """SHA-256 over relative paths, sizes and labels, and over how the sets were made."""
    digest = hashlib.sha256(note.encode())
    folders: dict[str, str] = {}
    for dataset in files:
        for path, size, label in zip(dataset.paths, dataset.sizes, dataset.labels.tolist(), strict=True):
            parent, name = os.path.split(path)
            if parent not in folders:
                folders[parent] = os.path.relpath(parent, root)
            relative = Path(folders[parent], name).as_posix()
            digest.update(f"{relative}\t{size}\t{label}\n".encode())
    return digest.hexdigest()
