"""Data sets by name or path, loaders that repeat themselves exactly, and the small backbone that needs no network.

Importing this room registers the offline backbones with timm.
"""

from mosa_kernels.data.backbone import OFFLINE_BACKBONE, load_offline_backbone, offline_backbone_card
from mosa_kernels.data.loaders import Loaders, make_loaders, set_epoch
from mosa_kernels.data.offline import OFFLINE_TASKS
from mosa_kernels.data.open import open_data
from mosa_kernels.data.splits import ArrayDataset, DataSplits, ImageDataset
from mosa_kernels.data.transforms import AUGMENTS

__all__ = [
    "AUGMENTS",
    "OFFLINE_BACKBONE",
    "OFFLINE_TASKS",
    "ArrayDataset",
    "DataSplits",
    "ImageDataset",
    "Loaders",
    "load_offline_backbone",
    "make_loaders",
    "offline_backbone_card",
    "open_data",
    "set_epoch",
]
