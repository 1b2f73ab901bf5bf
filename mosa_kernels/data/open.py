"""One way to any data set: `open_data`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mosa_kernels._files import expanded
from mosa_kernels.data.fgvc import open_fgvc
from mosa_kernels.data.folders import open_folder
from mosa_kernels.data.lists import compared, is_path
from mosa_kernels.data.named import open_timm, open_torchvision, train_on_all
from mosa_kernels.data.noise import with_label_noise
from mosa_kernels.data.offline import OFFLINE_TASKS, open_offline
from mosa_kernels.data.published import GICD, find_published
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.data.vtab import open_vtab

# Kinds of address: of data sets whose lists say which files are for what, whatever the seed; of libraries that look for
# the files themselves.
LISTED = ("vtab", "vtab1000", "fgvc")
NAMED = ("torchvision", "torchvision-all", "timm")


def open_data(
    name_or_path: str | os.PathLike[str],
    *,
    root: str | Path | None = None,
    seed: int = 0,
    image_size: int = 32,
    labels_per_class: int = 20,
    label_noise: float = 0.0,
    validation_share: float = 0.1,
    test_share: float = 0.2,
    verify: bool = False,
    download: bool = False,
    split_names: Mapping[str, str] | None = None,
    label_preserving: Iterable[str] | None = None,
) -> DataSplits:
    """Opens a data set by name or path.

        offline:digits, offline:location, ...   drawn in memory, no file needed
        vtab:/root/cifar                        VTAB-1k, 800 training and 200 validation images; see `vtab.py`
        vtab1000:/root/cifar                    the same for the final run: all 1000 images to train on
        fgvc:/root/CUB_200_2011                 a fine-grained data set with VPT's json splits; see `fgvc.py`
        torchvision:CIFAR100                    a class of torchvision.datasets, files under `root`
        torchvision-all:CIFAR100                the same for the final run: its validation images are trained on, too
        timm:hfds/uoft-cs/cifar100              a name under torch/ or hfds/ that timm.data.create_dataset takes
        anything else                           a folder of images: train/ val/ test/, or one folder of classes

    Args:
        name_or_path: see above.
        root: folder of the files of a torchvision or timm data set; what a relative vtab or fgvc folder is relative to.
        seed: of drawn images and of held-out parts.
        image_size, labels_per_class: for the offline tasks.
        label_noise: share of the training images whose label is made wrong, see `with_label_noise`.
        validation_share, test_share: shares held out where a data set lacks these sets.
        verify: decode every image now (what is drawn in memory has no files).
        download: let torchvision or timm fetch missing files.
        split_names: what a torchvision or timm data set calls "train", "validation" and "test".
        label_preserving: overrides the augmentations that keep the labels right ("crop", "flip", "shift", "colour").

    Raises:
        FileNotFoundError: no such folder, or files of a named data set are missing.
        ValueError: anything else that is wrong, by name.
    """
    text = os.fspath(name_or_path)
    if not is_path(text):
        raise ValueError(f"data: expected a name or a path in UTF-8, got {text!r}")
    kind, _, name = text.partition(":")
    if kind == "offline" and name:
        splits = open_offline(name, seed=seed, image_size=image_size, labels_per_class=labels_per_class)
    elif kind in ("vtab", "vtab1000") and name:
        splits = open_vtab(name, root=root, final=kind == "vtab1000", verify=verify)
    elif kind == "fgvc" and name:
        splits = open_fgvc(name, root=root, verify=verify)
    elif kind in NAMED and name:
        opener = open_timm if kind == "timm" else open_torchvision
        splits = opener(
            name,
            root=root,
            seed=seed,
            validation_share=validation_share,
            test_share=test_share,
            verify=verify,
            download=download,
            split_names=split_names,
        )
        splits = train_on_all(splits) if kind == "torchvision-all" else splits
        splits = compared(splits, find_published(GICD, name) if kind != "timm" else None)
    elif text and expanded(text).is_dir():  # an empty text would be the current folder
        splits = open_folder(text, seed=seed, validation_share=validation_share, test_share=test_share, verify=verify)
    else:
        raise FileNotFoundError(
            f"data: {text!r} is neither a folder nor a name; expected a folder of images, "
            f"{', '.join('offline:' + task for task in OFFLINE_TASKS)}, "
            "vtab:<folder>, vtab1000:<folder>, fgvc:<folder>, torchvision:<class>, torchvision-all:<class> or "
            "timm:<name>"
        )
    if label_preserving is not None:
        splits = dataclasses.replace(splits, label_preserving=frozenset(label_preserving))
    return with_label_noise(splits, label_noise, seed)
