"""Image files with labels that a list names: what the readers of VTAB-1k and FGVC share."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mosa_kernels._files import expanded
from mosa_kernels.data.classes import refuse_one_class
from mosa_kernels.data.files import (
    NAMED,
    FileDataset,
    check_disjoint,
    check_readable,
    files_fingerprint,
    kinds_of,
    look_up,
    placed,
    some,
)
from mosa_kernels.data.published import GROUPS, Published, differences, find_published, names_of
from mosa_kernels.data.splits import DataSplits


@dataclass(frozen=True)
class Listed:
    """One list: image paths relative to a folder, and integer labels."""

    source: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]


def named_folder(address: str) -> tuple[str | None, Path]:
    """The data set's name and folder of "name=/path"; of "/path" the folder alone."""
    named = re.fullmatch(r"([\w-]+)=(.+)", address)
    return (named[1], expanded(named[2])) if named else (None, expanded(address))


def locate(prefix: str, benchmark: str, address: str, root: str | Path | None = None) -> tuple[Path, Published]:
    """The folder and the table's row for "/path/of/folder", or "name=/path" where the folder is called otherwise.

    Args:
        prefix: of the address, for messages: "vtab" or "fgvc".
        benchmark: as in `Published`.
        address: what followed the prefix.
        root: what a relative folder is relative to; None: the current folder.

    Raises:
        ValueError: no data set of the benchmark has this name.
        FileNotFoundError: the folder does not exist.
    """
    given, place = named_folder(address)
    folder = expanded(root or "") / place
    name = given or folder.resolve().name
    row = find_published(benchmark, name)
    if row is None:
        raise ValueError(
            f"data: {name!r} is no data set of {benchmark}; expected one of {', '.join(names_of(benchmark))} or an "
            f"alias as the folder's name, or {prefix}:<name>=<folder>"
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"data: {row.title} ({benchmark}) was looked for in {folder}, which does not exist")
    return folder, row


def find_folder(parent: str | Path, benchmark: str, name: str) -> Path:
    """The folder of a data set below another, by its usual name or by another name in use.

    Args:
        parent: the folder that holds the benchmark's data sets.
        benchmark: as in `Published`.
        name: the usual name; its folder is returned, whether it exists or not, where there is no other.

    Raises:
        ValueError: not the usual name, but several others are there.
    """
    usual, row = Path(parent) / name, find_published(benchmark, name)
    if usual.is_dir() or row is None or not Path(parent).is_dir():
        return usual
    others = [path for path in sorted(Path(parent).iterdir()) if find_published(benchmark, path.name) == row]
    found = [path for path in others if path.is_dir()]
    if len(found) > 1:
        raise ValueError(
            f"{parent}: expected one folder of {row.title}, got {', '.join(path.name for path in found)}; call the one "
            f"that is meant {row.name}"
        )
    return found[0] if found else usual


def read_text(path: Path) -> str:
    """The text of a list, without the mark that some editors put before it.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = error.object[error.start]
        raise ValueError(f"{path}: expected UTF-8, got the byte {got:#x} at position {error.start}") from error


def is_number(label: str) -> bool:
    """Whether a label in a list is an integer of 64 bits: `str.isdigit` takes a superscript for one."""
    return re.fullmatch(r"-?\d{1,18}", label) is not None


def is_path(text: str) -> bool:
    """Whether a text can be a path: no path has a NUL in it, and none is written with half a character."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def dataset_of(listed: Listed, images: Path, obtained: str) -> FileDataset:
    """The files of a list.

    Args:
        listed: paths and labels.
        images: the folder that the paths are relative to.
        obtained: how the data set is usually obtained, for the message.

    Raises:
        FileNotFoundError: images of the list are missing; some are named.
        ValueError: some are empty files.
    """
    paths = [images / path for path in listed.paths]
    return FileDataset(paths, np.array(listed.labels), look_up(listed.source, paths, obtained))


def count_classes(lists: Iterable[Listed]) -> int:
    """How many classes the lists' labels number.

    Raises:
        ValueError: labels that do not run from 0 without gaps, all lists taken together.
    """
    labels = {label for listed in lists for label in listed.labels}
    classes = 1 + max(labels)
    if min(labels) < 0 or classes > len(labels):
        # One large label leaves more numbers out than memory holds.
        absent = list(itertools.islice((number for number in range(classes) if number not in labels), NAMED))
        wrong = f"none of {some(absent, classes - len(labels))}" if min(labels) >= 0 else f"{min(labels)}"
        sources = ", ".join(str(listed.source) for listed in lists)
        raise ValueError(f"{sources}: expected labels from 0 to {classes - 1} without gaps, got {wrong}")
    return classes


def check_trained(train: Listed, names: Sequence[str]) -> None:
    """Refuses classes, named in the order of the labels, of which there is no training image.

    Raises:
        ValueError: there are such classes; they are named.
    """
    untrained = [names[label] for label in sorted(set(range(len(names))) - set(train.labels))]
    if untrained:
        raise ValueError(f"{train.source}: no training image of the classes {some(untrained)}")


def assemble(
    row: Published,
    root: Path,
    files: Mapping[str, FileDataset],
    classes: Sequence[str],
    note: str,
    *,
    validation_in_train: bool = False,
    verify: bool = False,
) -> DataSplits:
    """A data set from the files of its three lists, compared with Table 11.

    Args:
        row: of the table.
        root: the folder that everything lies in.
        files: by split.
        classes: names, in the order of the labels.
        note: how the data are split.
        validation_in_train: the validation images are trained on, too.
        verify: decode every image now.

    Raises:
        ValueError: a single class, or images that are in two of the sets, or that cannot be read.
    """
    refuse_one_class(root, classes)
    _check_each_once(files, validation_in_train)
    if verify:
        check_readable(root, files.values())
    datasets = list(files.values())
    held = 0 if validation_in_train else len(files["validation"])
    differs = differences(row, len(classes), len(files["train"]), held, len(files["test"]))
    if row.group == GROUPS[-1]:
        note += "; crop and flip change some of these labels, augment=none leaves them right"
    return DataSplits(
        name=f"{row.benchmark}:{row.name}",
        train=files["train"],
        validation=files["validation"],
        test=files["test"],
        classes=tuple(classes),
        fingerprint=files_fingerprint(root, datasets, note),
        note=f"image files ({kinds_of(datasets)}); {note}",
        benchmark=row.benchmark,
        differs=differs,
        validation_in_train=validation_in_train,
    )


def _check_each_once(files: Mapping[str, FileDataset], validation_in_train: bool) -> None:
    pairs = [("train", "test"), ("validation", "test")]
    if not validation_in_train:
        pairs.append(("train", "validation"))
    check_disjoint(files, pairs)
    for split, dataset in files.items():
        twice = [place for place, count in Counter(placed(dataset.paths)).items() if count > 1]
        if twice:
            raise ValueError(f"the {split} list names images twice: {some(twice)}")


def compared(splits: DataSplits, row: Published | None) -> DataSplits:
    """A data set that another reader opened, with its differences from Table 11; unchanged where it has no row."""
    if row is None:
        return splits
    held = 0 if splits.validation_in_train else len(splits.validation)
    sizes = (len(splits.train), held, len(splits.test))
    return dataclasses.replace(splits, benchmark=row.benchmark, differs=differences(row, splits.num_classes, *sizes))
