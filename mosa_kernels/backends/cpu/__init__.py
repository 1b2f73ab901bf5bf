"""The CPU backend: plain PyTorch on tiles of tokens that stay in the cache."""

from __future__ import annotations

import torch

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.cpu.backward import adapter_backward
from mosa_kernels.backends.cpu.forward import adapter_forward

__all__ = ["adapter_backward", "adapter_forward", "available", "supports_adapter"]

_DTYPES = (torch.float32, torch.bfloat16)


def available() -> tuple[bool, str]:
    return True, ""


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    """Whether this backend takes the call, and if not, why. Looks at no tensor's values."""
    if args.x.device.type != "cpu":
        return False, f"x: expected on the CPU, got {args.x.device}"
    if args.x.dtype not in _DTYPES:
        return False, f"x: expected float32 or bfloat16, got {args.x.dtype}"
    if args.matmul_dtype not in _DTYPES:
        return False, f"autocast: expected float32 or bfloat16, got {args.matmul_dtype}"
    return True, ""
