"""Adapters in timm models, and the baselines they are compared with: inject, switch, count, merge, save, load, and the
two passes of training."""

from mosa_kernels.peft.backbone import BackboneMismatchError
from mosa_kernels.peft.checkpoint import load_adapter, save_adapter
from mosa_kernels.peft.config import MoSAConfig
from mosa_kernels.peft.count import TrainableParameters, trainable_parameters
from mosa_kernels.peft.files import AdapterFileError
from mosa_kernels.peft.fold import FoldLoss, merge_adapter, unmerge_adapter
from mosa_kernels.peft.inject import delete_adapter, inject_adapter
from mosa_kernels.peft.merge import merge_and_unload
from mosa_kernels.peft.per_sample import adapters_per_sample
from mosa_kernels.peft.placement import UnknownModelError
from mosa_kernels.peft.switch import active_adapter, adapter_names, disable_adapter, set_adapter
from mosa_kernels.peft.two_pass import TwoPassOutput, two_pass

__all__ = [
    "AdapterFileError",
    "BackboneMismatchError",
    "FoldLoss",
    "MoSAConfig",
    "TrainableParameters",
    "TwoPassOutput",
    "UnknownModelError",
    "active_adapter",
    "adapter_names",
    "adapters_per_sample",
    "delete_adapter",
    "disable_adapter",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_and_unload",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "two_pass",
    "unmerge_adapter",
]
