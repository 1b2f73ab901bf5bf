"""What the adapter's kernels for GPUs take, in either language."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensor

from mosa_kernels.backends.arguments import TENSORS, AdapterArguments
from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN

_MAX_WIDTH = 4096
_MAX_BOTTLENECK = 256
_MAX_TOKENS = 2**30  # 32-bit numbers count them, and the parts that they are split into go beyond the last
_NOT_MULTIPLIED = ("expert", "seed", "activity")  # read as numbers, or not at all
_OWNERS = ("assignment", "assignment_down")


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
    if dtype not in DTYPE_CODES:
        return False, f"products in {dtype} are not taken"
    for name in args._fields[:TENSORS]:
        tensor = getattr(args, name)
        if tensor is None:
            continue
        if type(tensor) not in PLAIN and not isinstance(tensor, FakeTensor):
            return False, f"{name} is a {type(tensor).__name__}, not a plain tensor"
        if name in _NOT_MULTIPLIED:
            continue
        if tensor.dtype not in DTYPE_CODES and name not in _OWNERS:
            return False, f"{name} has dtype {tensor.dtype}"
        if name not in ("x", "residual") and not tensor.is_contiguous():
            return False, f"{name} is not contiguous"
    return True, ""
