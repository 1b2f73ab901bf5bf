"""What the adapter's kernels for GPUs take, in either language."""

from __future__ import annotations

import torch

from mosa_kernels.backends.arguments import AdapterArguments

_MAX_WIDTH = 4096
_MAX_BOTTLENECK = 256
_MAX_TOKENS = 2**30  # 32-bit numbers count them, and the parts that they are split into go beyond the last
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(args: AdapterArguments) -> tuple[bool, str]:
    """Whether kernels take the call on whatever device, and if not, why. Looks at no tensor's values."""
    x = args.x
    if x.numel() == 0:
        return False, "x is empty"
    if x.shape[-1] > _MAX_WIDTH:
        return False, f"x is {x.shape[-1]} wide, at most {_MAX_WIDTH} are taken"
    if args.w_down.shape[0] > _MAX_BOTTLENECK:
        return False, f"the bottleneck is {args.w_down.shape[0]} wide, at most {_MAX_BOTTLENECK} are taken"
    if x.numel() // x.shape[-1] > _MAX_TOKENS:
        return False, f"x has {x.numel() // x.shape[-1]} tokens, at most {_MAX_TOKENS} are taken"
    dtype = args.compute_dtype or args.x.dtype
    if dtype not in _DTYPES:
        return False, f"products in {dtype} are not taken"
    for name, tensor in zip(args._fields[:13], args[:13], strict=True):
        if tensor is None or name == "expert":
            continue
        if tensor.dtype not in _DTYPES and name not in ("assignment", "assignment_down"):
            return False, f"{name} has dtype {tensor.dtype}"
        if name not in ("x", "residual") and not tensor.is_contiguous():
            return False, f"{name} is not contiguous"
    return True, ""
