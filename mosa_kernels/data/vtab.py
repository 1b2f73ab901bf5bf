"""VTAB-1k as folders and lists, the form that NOAH, SSF and PETL-ViT read.

    <root>/<data set>/train800.txt          800 images to train on while hyper-parameters are chosen
                      val200.txt            200 images to choose them with
                      train800val200.txt    the 1000 images of the final run
                      test.txt              the test images
                      images/...            lines of the lists are "images/test/000000.jpg 17": path and label

Two addresses serve the two halves of the protocol: "vtab:<root>/<data set>" trains on 800 and validates on 200, and
"vtab1000:<root>/<data set>" trains on all 1000, where nothing is left to choose an epoch with.
"""

from __future__ import annotations

from pathlib import Path

from mosa_kernels.data.lists import Listed, assemble, count_classes, dataset_of, locate
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
        ValueError: an unknown data set, or a list that is not "path label" a line.
    """
    folder, row = locate("vtab1000" if final else "vtab", VTAB, address, root)
    wanted = {"train": "whole" if final else "train", "validation": "validation", "test": "test"}
    missing = [LISTS[name] for name in wanted.values() if not (folder / LISTS[name]).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found there. {OBTAINED}")
    lists = {split: read_list(folder / LISTS[name]) for split, name in wanted.items()}
    classes = count_classes(lists.values())
    files = {split: dataset_of(listed, folder, OBTAINED) for split, listed in lists.items()}
    if final and not set(files["validation"].paths) <= set(files["train"].paths):
        raise ValueError(f"{folder / LISTS['whole']}: expected the images of {LISTS['validation']} in it")
    note = (
        "trained on all 1000 images, the validation images among them: take the last epoch"
        if final
        else "trained on 800 images, validated on 200: for choosing hyper-parameters"
    )
    names = [str(number) for number in range(classes)]
    return assemble(row, folder, files, names, note, validation_in_train=final, verify=verify)


def read_list(path: Path) -> Listed:
    """Reads lines of "path label".

    Raises:
        ValueError: no lines, or one that has no integer at its end; its number is named.
    """
    paths, labels = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        name, *label = line.strip().rsplit(maxsplit=1)
        if not label or not label[0].lstrip("-").isdigit():
            raise ValueError(f"{path}, line {number}: expected 'path label', got {line!r}")
        paths.append(name)
        labels.append(int(label[0]))
    if not paths:
        raise ValueError(f"{path}: expected lines of 'path label', found none")
    return Listed(path, tuple(paths), tuple(labels))
