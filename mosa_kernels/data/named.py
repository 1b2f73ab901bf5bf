"""Data sets by name: "torchvision:CIFAR100" and "timm:hfds/uoft-cs/cifar100"."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from mosa_kernels._files import expanded
from mosa_kernels.data.classes import refuse_one_class
from mosa_kernels.data.files import (
    FileDataset,
    check_disjoint,
    check_one_label,
    check_readable,
    files_fingerprint,
    look_up,
)
from mosa_kernels.data.folders import refuse_one_folder, refuse_sets_as_classes
from mosa_kernels.data.images import read_image
from mosa_kernels.data.splits import DataSplits, ImageDataset, SubsetDataset, stratified_parts
from mosa_kernels.data.wrapped import RGBDataset, labels_of

# What torchvision and timm call the three sets; the first name that a data set knows is taken.
SPLIT_NAMES = {"train": ("train", "trainval"), "validation": ("val", "valid", "validation"), "test": ("test",)}


# The prefixes of timm's names; under the first two data sets have a length and items.
TIMM_INDEXED, TIMM_ITERABLE = ("torch", "hfds"), ("hfids", "tfds", "wds")


def open_torchvision(
    name: str,
    *,
    root: str | Path | None,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    verify: bool = False,
    download: bool = False,
    split_names: Mapping[str, str] | None = None,
) -> DataSplits:
    """Opens a classification data set of torchvision by its class name.

    Args:
        name: as in `torchvision.datasets`, for example "CIFAR100".
        root: the folder that holds (or is to hold) its files.
        seed, validation_share, test_share: for sets that the data set does not have itself.
        verify: decode every image now.
        download: fetch the files when they are missing.
        split_names: what the data set calls "train", "validation" and "test", where the usual names are not meant.

    Raises:
        ValueError: no such data set, one that is not for classification, sets that share files, or unreadable images.
        FileNotFoundError: its files are missing (torchvision's own words, with the folder named, or the images').
    """
    from torchvision import datasets

    _check_split_names(split_names)
    maker = getattr(datasets, name, None)
    if not (inspect.isclass(maker) and issubclass(maker, datasets.VisionDataset)):
        known = sorted(n for n in dir(datasets) if n.lower() == name.lower())
        raise ValueError(f"torchvision has no data set {name!r}" + (f"; did you mean {known[0]!r}?" if known else ""))
    accepted = inspect.signature(maker).parameters
    if split_names and "split" not in accepted:
        raise ValueError(f"split_names: expected None for torchvision:{name}, whose sets have no names")
    fixed: dict[str, Any] = {}
    if "root" in accepted:
        if root is None:
            raise ValueError(f"root: expected the folder of torchvision:{name} (--data-root), got None")
        fixed["root"] = str(expanded(root))
    elif root is not None:
        raise ValueError(f"root: expected None for torchvision:{name}, which has no files, got {root}")
    if "download" in accepted:
        fixed["download"] = download
    if "loader" in accepted:  # torchvision's own makes 16-bit images white
        fixed["loader"] = read_image

    def make(**which: Any) -> RGBDataset:
        try:
            return RGBDataset(maker(**fixed, **which), f"torchvision:{name}")
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(_missing(f"torchvision:{name}", fixed.get("root"), error, download)) from error

    parts: dict[str, RGBDataset] = {}
    if "split" in accepted:
        for split, usual in SPLIT_NAMES.items():
            for candidate in (split_names[split],) if split_names and split in split_names else usual:
                try:
                    parts[split] = make(split=candidate)
                    break
                except ValueError:
                    if split_names and split in split_names:
                        raise
    elif "train" in accepted:
        parts = {"train": make(train=True), "test": make(train=False)}
    else:
        parts = {"train": make()}
    return _assemble(f"torchvision:{name}", parts, fixed.get("root"), seed, validation_share, test_share, verify)


def open_timm(
    name: str,
    *,
    root: str | Path | None,
    seed: int = 0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    verify: bool = False,
    download: bool = False,
    split_names: Mapping[str, str] | None = None,
) -> DataSplits:
    """Opens a data set through `timm.data.create_dataset`.

    Without `split_names` the test set is what timm calls "test" or else "validation", and validation images are held
    out of "train": for many names timm gives the same images for "validation" and "test".

    Args:
        name: timm's name: "torch/cifar100" or "hfds/<hub name>".
        root: folder of the files, where the name needs one.
        seed, validation_share, test_share: for the held-out parts.
        verify: decode every image now.
        download: fetch what is missing.
        split_names: timm's split for "train", "validation" and "test".

    Raises:
        ValueError: an iterable data set (they have no length and cannot be split), a folder, an unknown name, sets
            that share files, or unreadable images.
        FileNotFoundError: its files are missing (timm's own words, with the folder named, or the images').
    """
    from timm.data import create_dataset

    _check_split_names(split_names)
    _check_timm_name(name)
    named = dict(split_names or {})
    folder = None if root is None else str(expanded(root))

    def make(split: str) -> RGBDataset:
        try:
            dataset = create_dataset(name, root=folder, split=split, download=download)
        except (AssertionError, KeyError) as error:
            raise ValueError(f"timm:{name} in {folder}, split {split!r}: {error or 'timm does not know it'}") from error
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(_missing(f"timm:{name}", folder, error, download)) from error
        return RGBDataset(dataset, f"timm:{name}")

    parts = {"train": make(named.get("train", "train"))}
    if "validation" in named:
        parts["validation"] = make(named["validation"])
    if "test" in named:
        parts["test"] = make(named["test"])
    else:
        try:
            parts["test"] = make("test")
        except (ValueError, FileNotFoundError):
            parts["test"] = make("validation")
    return _assemble(f"timm:{name}", parts, folder, seed, validation_share, test_share, verify)


def _check_split_names(split_names: Mapping[str, str] | None) -> None:
    """Refuses names of sets that there are not: theirs would be held out of the training set, unasked."""
    unknown = [split for split in split_names or () if split not in SPLIT_NAMES]
    if unknown:
        raise ValueError(f"split_names: expected some of {', '.join(SPLIT_NAMES)}, got {', '.join(unknown)}")


def _check_timm_name(name: str) -> None:
    """Refuses names that timm would read as a folder's.

    Its reader of folders takes any name without a known prefix, and where a set has no folder it reads all of them:
    the test set would hold the training images.
    """
    prefix, slash, rest = name.partition("/")
    if slash and prefix.lower() in TIMM_ITERABLE:
        raise ValueError(f"timm:{name} is an iterable data set; only those with a length and items can be used")
    folder = prefix.lower() == "torch" and rest.rpartition("/")[2].lower() in ("folder", "image_folder")
    if not slash or prefix.lower() not in TIMM_INDEXED or folder:
        known = " or ".join(f"timm:{known}/<name>" for known in TIMM_INDEXED)
        raise ValueError(
            f"timm:{name}: expected {known}; a folder of images, which timm takes other names for, is opened by giving "
            "its path as the data"
        )


def train_on_all(splits: DataSplits) -> DataSplits:
    """The same for the final run: the validation images, held out or a set of their own, are trained on, too."""
    note = f"{splits.note}; the validation images are trained on, too: take the last epoch"
    return dataclasses.replace(
        splits,
        train=ConcatDataset([splits.train, splits.validation]),  # type: ignore[list-item]  # they have the methods
        fingerprint=hashlib.sha256(f"{splits.fingerprint}\nall".encode()).hexdigest(),
        note=note,
        validation_in_train=True,
    )


def _missing(name: str, folder: str | None, error: Exception, download: bool) -> str:
    hint = "" if download else " (download=True, on the command line `train --download`, fetches what can be fetched)"
    return f"{name} in {folder}: {str(error).strip().rstrip('.')}{hint}"


def _assemble(
    name: str,
    parts: dict[str, RGBDataset],
    root: str | None,
    seed: int,
    validation_share: float,
    test_share: float,
    verify: bool,
) -> DataSplits:
    """Completes the sets that the data set has itself by held-out parts of its training set, and checks them."""
    if "train" not in parts:
        raise ValueError(f"{name}: it has no training set under the usual names; give split_names")
    labels = {split: labels_of(dataset) for split, dataset in parts.items()}
    classes = _class_names(parts["train"], labels)
    files = _files_of(name, parts, labels)
    # Validation and test may be one set on purpose, where split_names says so.
    check_disjoint(files, [("train", "test"), ("train", "validation")])
    if verify:
        check_readable(name, parts.values())
    if "test" not in parts and "validation" in parts:
        parts["test"], labels["test"] = parts.pop("validation"), labels.pop("validation")
    missing = [split for split in ("validation", "test") if split not in parts]
    shares = [{"validation": validation_share, "test": test_share}[split] for split in missing]
    sets: dict[str, ImageDataset] = {
        split: SubsetDataset(dataset, np.arange(len(dataset)), labels[split]) for split, dataset in parts.items()
    }
    note = "its own train, validation and test sets"
    if "train" in files:
        check_one_label(f"{name}, train", files["train"], to_be_split=bool(missing))
    if missing:
        cut = stratified_parts(labels["train"], shares, classes, seed)
        for split, part in zip(("train", *missing), cut, strict=True):
            sets[split] = SubsetDataset(parts["train"], part, labels["train"][part])
        held = " and ".join(f"{split} ({share:g})" for split, share in zip(missing, shares, strict=True))
        note = f"{held} held out of its training set with seed {seed}"
    digest = hashlib.sha256(f"{name}\n{note}\n".encode())
    for split in sorted(labels):
        digest.update(labels[split].astype("<i8").tobytes())
    if files:
        digest.update(files_fingerprint(Path(root or ""), [files[split] for split in sorted(files)], note).encode())
    return DataSplits(
        name=name,
        train=sets["train"],
        validation=sets["validation"],
        test=sets["test"],
        classes=classes,
        fingerprint=digest.hexdigest(),
        note=f"read through {name.split(':')[0]}; {note}",
    )


def _files_of(
    name: str, parts: Mapping[str, RGBDataset], labels: Mapping[str, NDArray[np.int64]]
) -> dict[str, FileDataset]:
    """The files of the sets whose library lists them, all there and none empty."""
    return {
        split: FileDataset(part.files, labels[split], look_up(f"{name}, {split}", part.files))
        for split, part in parts.items()
        if part.files is not None
    }


def _class_names(train: RGBDataset, labels: dict[str, NDArray[np.int64]]) -> tuple[str, ...]:
    every = np.concatenate(list(labels.values()))
    if len(every) == 0 or every.min() < 0:
        raise ValueError(
            f"{train.name}: expected labels from 0 upwards, got {'none' if not len(every) else every.min()}"
        )
    count = int(every.max()) + 1
    named = getattr(train.dataset, "classes", None)
    if named is not None and len(named) >= count:
        classes = tuple(str(entry) for entry in named)
        refuse_sets_as_classes(train.name, classes)
        refuse_one_folder(train.name, classes)
        return classes
    if count > len(every):
        raise ValueError(
            f"{train.name}: expected labels from 0 without gaps, got {count - 1} as one of {len(every)} images"
        )
    numbers = tuple(str(number) for number in range(count))
    refuse_one_class(train.name, numbers)
    return numbers
