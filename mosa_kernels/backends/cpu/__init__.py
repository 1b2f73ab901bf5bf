"""The CPU backend: tiles of tokens that stay in the cache, compiled, or in PyTorch where nothing was built."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds
from mosa_kernels.backends.cpu import backward, compiled, forward

_DTYPES = (torch.float32, torch.bfloat16)


def available() -> tuple[bool, str]:
    return True, ""


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    """Whether this backend takes the call, and if not, why. Looks at no tensor's values."""
    if args.x.device.type != "cpu":
        return False, f"x: expected on the CPU, got {args.x.device}"
    if args.x.is_nested or args.x.shape[-1] == 0:
        return False, "x: expected rows of one length, of at least one number"
    if args.x.dtype not in _DTYPES:
        return False, f"x: expected float32 or bfloat16, got {args.x.dtype}"
    dtype = args.compute_dtype or args.x.dtype
    if dtype not in _DTYPES:
        return False, f"autocast: expected float32 or bfloat16, got {dtype}"
    return True, ""


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    """One adapter call without autograd.

    Returns:
        out: contiguous, shape and dtype of x.
        mean, rstd: LayerNorm statistics, float32 [T]; empty without a norm.
    """
    if args.residual is not None and args.residual.dtype != args.x.dtype:
        args = args._replace(residual=args.residual.to(args.x.dtype))
    run = compiled.adapter_forward if compiled.supports_adapter(args)[0] else forward.adapter_forward
    return run(args)


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    """The gradients asked for in `needs`.

    Args:
        grad_out: gradient of the output, shaped like x.
        mean, rstd: LayerNorm statistics from `adapter_forward`, float32 [T] or empty.
    """
    run = compiled.adapter_backward if compiled.supports_adapter(args)[0] else backward.adapter_backward
    return run(args, grad_out, mean, rstd, needs)
