"""VTAB-1k as folders and lists, the form that NOAH, SSF and PETL-ViT read.

    <root>/<data set>/train800.txt          800 images to train on while hyper-parameters are chosen
                      val200.txt            200 images to choose them with
                      train800val200.txt    the 1000 images of the final run
                      test.txt              the test images
                      images/...            lines of the lists are "images/test/000000.jpg 17": path and label

The list of 1000 names the same files as the lists of 800 and 200, or copies of its own (images/train800val200/...), as
NOAH's script writes them.

Two addresses serve the two halves of the protocol: "vtab:<root>/<data set>" trains on 800 and validates on 200, and
"vtab1000:<root>/<data set>" trains on all 1000, where nothing is left to choose an epoch with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mosa_kernels.data.files import placed, some
from mosa_kernels.data.lists import (
    Listed,
    assemble,
    check_trained,
    count_classes,
    dataset_of,
    is_number,
    is_path,
    locate,
    read_text,
)
from mosa_kernels.data.published import VTAB
from mosa_kernels.data.splits import DataSplits

LISTS = {
    "train": "train800.txt",
    "validation": "val200.txt",
    "whole": "train800val200.txt",
    "test": "test.txt",
}
OBTAINED = (
    "VTAB-1k in this form is usually obtained as the archive vtab-1k.tar that the NOAH repository "
    "(github.com/ZhangYuanhan-AI/NOAH) links to, or built from TFDS by its script; unpack it so that the lists lie in "
    "<root>/<data set>/"
)


def open_vtab(address: str, *, root: str | Path | None = None, final: bool = False, verify: bool = False) -> DataSplits:
    """Opens one of the 19 data sets.

    Args:
        address: the data set's folder; its name, or what precedes "=", is one of the names in use.
        root: what a relative address is relative to.
        final: train on the 1000 images of train800val200.txt.
        verify: decode every image now.

    Raises:
        FileNotFoundError: the folder, a list or images are missing: which, where, and how they are obtained.
        ValueError: an unknown data set, a list that is not "path label" a line, lists that contradict each other, or
            test images of a class that is not trained on.
    """
    folder, row = locate("vtab1000" if final else "vtab", VTAB, address, root)
    wanted = {"train": "whole" if final else "train", "validation": "validation", "test": "test"}
    missing = [LISTS[name] for name in wanted.values() if not (folder / LISTS[name]).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found there. {OBTAINED}")
    lists = {split: read_list(folder / LISTS[name]) for split, name in wanted.items()}
    classes = count_classes(lists.values())
    names = [str(number) for number in range(classes)]
    if classes != row.classes:  # the 1000 images are drawn at random: Sun397's do not show all of its 397 classes
        check_trained(lists["train"], names)
    if final:
        _check_whole(folder, lists["train"], lists["validation"])
    files = {split: dataset_of(listed, folder, OBTAINED) for split, listed in lists.items()}
    note = (
        "trained on all 1000 images, the validation images among them: take the last epoch"
        if final
        else "trained on 800 images, validated on 200: for choosing hyper-parameters"
    )
    return assemble(row, folder, files, names, note, validation_in_train=final, verify=verify)


def _check_whole(folder: Path, whole: Listed, validation: Listed) -> None:
    """Refuses a list of 1000 that is not those of 800 and 200 together; where that of 800 is missing, one without 200.

    Raises:
        ValueError: they name other images or labels; some are named.
    """
    source = folder / LISTS["train"]
    parts = [read_list(source), validation] if source.is_file() else [validation]
    here, there = _labels(folder, [whole]), _labels(folder, parts)
    if here.keys().isdisjoint(there):  # copies of its own, which have nothing but their labels to be known by
        here, there = _counts([whole]), _counts(parts) if len(parts) == 2 else {}
    wrong = [
        f"{what}: {here.get(what, 'none')} instead of {there.get(what, 'none')}"
        for what in (there | here if len(parts) == 2 else there)
        if here.get(what) != there.get(what)
    ]
    if wrong:
        named = " and ".join(part.source.name for part in parts)
        raise ValueError(f"{whole.source}: expected the images and labels of {named}, got {some(wrong)}")


def _labels(folder: Path, lists: Iterable[Listed]) -> dict[str, int]:
    """The label of each image, however its path is spelled."""
    found: dict[str, int] = {}
    for listed in lists:
        places = placed([folder / path for path in listed.paths])
        found |= {f"label of {place}": label for place, label in zip(places, listed.labels, strict=True)}
    return found


def _counts(lists: Iterable[Listed]) -> dict[str, int]:
    return Counter(f"images of class {label}" for listed in lists for label in listed.labels)


def read_list(path: Path) -> Listed:
    """Reads lines of "path label".

    Raises:
        ValueError: no lines, or one that has no integer at its end or no path before it; its number is named.
    """
    paths, labels = [], []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, *label = line.strip().rsplit(maxsplit=1)
        if not label or not is_number(label[0]) or not is_path(name):
            raise ValueError(f"{path}, line {number}: expected 'path label', got {line!r}")
        paths.append(name)
        labels.append(int(label[0]))
    if not paths:
        raise ValueError(f"{path}: expected lines of 'path label', found none")
    return Listed(path, tuple(paths), tuple(labels))
