"""Fused mixture-of-sparse-adapters (MoSA, arXiv 2312.02923) for PyTorch and timm.

The public names are imported when they are first used, so `import mosa_kernels` is immediate.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mosa_kernels.version import __version__

if TYPE_CHECKING:
    from mosa_kernels.backends.choice import available_backends
    from mosa_kernels.backends.lookup import prefer_backends
    from mosa_kernels.functional.adapter import mosa_adapter
    from mosa_kernels.functional.merge import merge_adapters
    from mosa_kernels.functional.split import split
    from mosa_kernels.losses import MoSALoss
    from mosa_kernels.nn.adapter import FusedMoSAAdapter
    from mosa_kernels.nn.dense import DenseAdapter
    from mosa_kernels.nn.lora import FusedMoSALoRA
    from mosa_kernels.nn.sampler import experts_per_sample, inference_experts
    from mosa_kernels.optim import MoSAAdamW
    from mosa_kernels.peft import (
        FoldLoss,
        MoSAConfig,
        adapters_per_sample,
        disable_adapter,
        inject_adapter,
        load_adapter,
        merge_adapter,
        merge_and_unload,
        save_adapter,
        set_adapter,
        trainable_parameters,
        two_pass,
        unmerge_adapter,
    )

_HOME = {
    "available_backends": "backends.choice",
    "prefer_backends": "backends.lookup",
    "mosa_adapter": "functional.adapter",
    "merge_adapters": "functional.merge",
    "split": "functional.split",
    "MoSALoss": "losses",
    "FusedMoSAAdapter": "nn.adapter",
    "FusedMoSALoRA": "nn.lora",
    "FoldLoss": "peft",
    "adapters_per_sample": "peft",
    "merge_adapter": "peft",
    "unmerge_adapter": "peft",
    "DenseAdapter": "nn.dense",
    "experts_per_sample": "nn.sampler",
    "inference_experts": "nn.sampler",
    "MoSAAdamW": "optim",
    "MoSAConfig": "peft",
    "disable_adapter": "peft",
    "inject_adapter": "peft",
    "load_adapter": "peft",
    "merge_and_unload": "peft",
    "save_adapter": "peft",
    "set_adapter": "peft",
    "trainable_parameters": "peft",
    "two_pass": "peft",
}

__all__ = [
    "DenseAdapter",
    "FoldLoss",
    "FusedMoSAAdapter",
    "FusedMoSALoRA",
    "MoSAAdamW",
    "MoSAConfig",
    "MoSALoss",
    "__version__",
    "adapters_per_sample",
    "available_backends",
    "disable_adapter",
    "experts_per_sample",
    "inference_experts",
    "inject_adapter",
    "load_adapter",
    "merge_adapter",
    "merge_adapters",
    "merge_and_unload",
    "mosa_adapter",
    "prefer_backends",
    "save_adapter",
    "set_adapter",
    "split",
    "trainable_parameters",
    "two_pass",
    "unmerge_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
