"""The CUDA C++ backend of the adapter: fused kernels for NVIDIA GPUs from compute capability 7.0 (V100) on.

Products of fp16 run on the matrix units of every such GPU, those of bf16 and float32 (three TF32 products) from 8.0 on.
Below that both are plain fused multiply-adds in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mosa_kernels._extension import cuda_version, extension, why_no_code_for
from mosa_kernels.backends.adapter_kernels import takes
from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds
from mosa_kernels.backends.cuda import adapter
from mosa_kernels.backends.cuda.code import why_no_code
from mosa_kernels.backends.cuda.device import current

_found: tuple[bool, str] | None = None


@torch.compiler.assume_constant_result  # a graph that asks first would break at the import of the compiled module
def available() -> tuple[bool, str]:
    global _found
    if _found is None:
        _found = _look()
    return _found


def _look() -> tuple[bool, str]:
    module, _, reason = extension()
    if reason is not None:
        return False, reason
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    if torch.version.hip is not None:
        return False, "the kernels are for NVIDIA GPUs"
    assert module is not None
    # The module has a CUDA runtime of its own, which may be newer than that of PyTorch.
    toolkit, driver = module.build_info["cuda_toolkit"], module.cuda_driver_version()
    if driver // 1000 < int(toolkit.split(".")[0]):
        known = cuda_version(driver)
        return False, f"the kernels were built with CUDA {toolkit}, and the driver is for CUDA {known} at most"
    return True, ""


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    """Whether this backend takes the call, and if not, why. Looks at no tensor's values."""
    if not args.x.is_cuda:
        return False, f"x is on {args.x.device}, not on a CUDA device"
    reason = why_no_code(args.x.device)
    return takes(args) if reason is None else (False, reason)


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    with current(args.x.device):
        return adapter.adapter_forward(args, _launch_on(args.x.device))


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    with current(args.x.device):
        return adapter.adapter_backward(args, grad_out, mean, rstd, needs, _launch_on(args.x.device))


def _launch_on(device: torch.device) -> adapter.Launch:
    module = extension().module
    assert module is not None
    stream = torch.cuda.current_stream(device)
    return adapter.Launch(module, stream.device_index, stream.cuda_stream, *_properties(stream.device_index))


@cache
def _properties(device: int) -> tuple[int, bool]:
    """Multiprocessors, and whether there are matrix units for bf16, and code that uses them: PTX of 7.5 has none."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, why_no_code_for((found.major, found.minor), made_for=(8, 0)) is None
