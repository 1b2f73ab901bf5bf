"""Adapters in timm models: inject, switch, count, merge, save, load."""

from mosa_kernels.peft.config import MoSAConfig
from mosa_kernels.peft.inject import delete_adapter, inject_adapter
from mosa_kernels.peft.switch import active_adapter, adapter_names, disable_adapter, set_adapter

__all__ = [
    "MoSAConfig",
    "active_adapter",
    "adapter_names",
    "delete_adapter",
    "disable_adapter",
    "inject_adapter",
    "set_adapter",
]
