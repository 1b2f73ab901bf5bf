"""The paper's 27 data sets: classes and split sizes (arXiv 2312.02923, Table 11), and the names in use.

Published numbers differ most often because a copy of the data differs. `differences` names where a data set that was
opened is not the one of the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

VTAB, FGVC, GICD = "VTAB-1k", "FGVC", "GICD"
GROUPS = ("natural", "specialized", "structured")


@dataclass(frozen=True)
class Published:
    """A row of Table 11.

    Attributes:
        name: as the folders of the usual copies are called.
        benchmark: "VTAB-1k", "FGVC" or "GICD".
        title: as in the paper's tables.
        classes, train, validation, test: numbers of classes and of images; a validation of None is one that the
            table leaves open; its number of training images counts all.
        group: of VTAB-1k: "natural", "specialized" or "structured".
        aliases: other names in use.
    """

    name: str
    benchmark: str
    title: str
    classes: int
    train: int
    validation: int | None
    test: int
    group: str = ""
    aliases: tuple[str, ...] = ()


def _vtab(group: str, name: str, title: str, classes: int, test: int, *aliases: str) -> Published:
    return Published(name, VTAB, title, classes, 800, 200, test, group, aliases)


PUBLISHED: tuple[Published, ...] = (
    Published("CUB_200_2011", FGVC, "CUB-200-2011", 200, 5394, 600, 5794, aliases=("cub", "cub200", "cub2002011")),
    Published("nabirds", FGVC, "NABirds", 555, 21536, 2393, 24633, aliases=("nabirds", "nabrids")),
    Published(
        "OxfordFlowers", FGVC, "Oxford Flowers", 102, 1020, 1020, 6149, aliases=("flowers", "flowers102")
    ),
    Published("Stanford-dogs", FGVC, "Stanford Dogs", 120, 10800, 1200, 8580, aliases=("dogs", "stanforddogs")),
    Published("Stanford-cars", FGVC, "Stanford Cars", 196, 7329, 815, 8041, aliases=("cars", "stanfordcars")),
    _vtab("natural", "cifar", "CIFAR-100", 100, 10000, "cifar100", "cifar(num_classes=100)"),
    _vtab("natural", "caltech101", "Caltech101", 102, 6084, "caltech"),
    _vtab("natural", "dtd", "DTD", 47, 1880, "describable_textures"),
    _vtab("natural", "oxford_flowers102", "Flowers102", 102, 6149, "flowers102", "flowers", "oxford_flowers"),
    _vtab("natural", "oxford_iiit_pet", "Pets", 37, 3669, "pets", "pet", "oxford_pets", "oxford_iiit_pets"),
    _vtab("natural", "svhn", "SVHN", 10, 26032, "svhn_cropped"),
    _vtab("natural", "sun397", "Sun397", 397, 21750, "sun"),
    _vtab("specialized", "patch_camelyon", "Patch Camelyon", 2, 32768, "camelyon", "pcam", "patchcamelyon"),
    _vtab("specialized", "eurosat", "EuroSAT", 10, 5400),
    _vtab("specialized", "resisc45", "Resisc45", 45, 6300, "resisc"),
    _vtab(
        "specialized", "diabetic_retinopathy", "Retinopathy", 5, 42670, "retinopathy", "diabetic_retinopathy_detection"
    ),
    _vtab("structured", "clevr_count", "Clevr/count", 8, 15000, "clevr(task=count_all)", "clevr_count_all"),
    _vtab(
        "structured", "clevr_dist", "Clevr/distance", 6, 15000, "clevr_distance", "clevr(task=closest_object_distance)",
        "clevr_closest_object_distance",
    ),
    _vtab("structured", "dmlab", "DMLab", 6, 22735),
    _vtab(
        "structured", "kitti", "KITTI/distance", 4, 711, "kitti_dist", "kitti_distance",
        "kitti(task=closest_vehicle_distance)", "kitti_closest_vehicle_distance",
    ),
    _vtab(
        "structured", "dsprites_loc", "dSprites/location", 16, 73728, "dsprites_location", "dsprites_label_x_position",
        "dsprites(predicted_attribute=label_x_position,num_classes=16)", "dsprites_xpos",
    ),
    _vtab(
        "structured", "dsprites_ori", "dSprites/orientation", 16, 73728, "dsprites_orientation",
        "dsprites_label_orientation", "dsprites(predicted_attribute=label_orientation,num_classes=16)",
        "dsprites_orient",
    ),
    _vtab(
        "structured", "smallnorb_azi", "SmallNORB/azimuth", 18, 12150, "smallnorb_azimuth", "smallnorb_label_azimuth",
        "smallnorb(predicted_attribute=label_azimuth)",
    ),
    _vtab(
        "structured", "smallnorb_ele", "SmallNORB/elevation", 9, 12150, "smallnorb_elevation",
        "smallnorb_label_elevation", "smallnorb(predicted_attribute=label_elevation)",
    ),
    Published("CIFAR100", GICD, "CIFAR-100", 100, 50000, None, 10000, aliases=("cifar100",)),
    Published("FGVCAircraft", GICD, "Aircraft", 100, 3334, 3333, 3333, aliases=("aircraft",)),
    Published("Food101", GICD, "Food-101", 101, 75750, None, 25250, aliases=("food101",)),
)  # fmt: skip


def _folded(name: str) -> str:
    """Names up to case and punctuation, without the benchmark that some put in front."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^vtab(1k)?(?=.)", "", plain)


def names_of(benchmark: str) -> tuple[str, ...]:
    """The data sets of a benchmark, in the order of the table."""
    return tuple(row.name for row in PUBLISHED if row.benchmark == benchmark)


def find_published(benchmark: str, name: str) -> Published | None:
    """The row of a data set by any of its names, whatever the case and the punctuation; None: there is none."""
    wanted = _folded(name)
    for row in PUBLISHED:
        if row.benchmark == benchmark and wanted in {_folded(known) for known in (row.name, row.title, *row.aliases)}:
            return row
    return None


def differences(row: Published, classes: int, train: int, validation: int, test: int) -> tuple[str, ...]:
    """Where a data set is not the one of Table 11, in words; nothing where it is.

    Args:
        row: of the table.
        classes, train, validation, test: what was found. A training set that holds the validation images too counts
            with them, and `validation` is then 0; images held out of a training set that the table gives as a whole
            are a difference.
    """
    found = [("classes", classes, row.classes)]
    if validation == 0:
        found.append(("training and validation images", train + validation, row.train + (row.validation or 0)))
    else:
        hint = f" (torchvision-all:{row.name} trains on them, too)" if row.validation is None else ""
        found += [
            ("training images", train, row.train),
            (f"validation images{hint}", validation, row.validation or 0),
        ]
    found.append(("test images", test, row.test))
    return tuple(f"{here:,} {what} instead of {there:,}" for what, here, there in found if here != there)
