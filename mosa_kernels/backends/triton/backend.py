"""The Triton backend: fused kernels for NVIDIA GPUs of compute capability 8.0 and later.

`TRITON_INTERPRET=1`, set before this is imported, runs the same kernels on CPU tensors, slowly, to check them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.adapter_kernels import takes
from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds

_MAX_BIAS_ROWS = 64  # the rows of b_up whose gradients one program holds in registers
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
_LEAST = (8, 0)
_found: tuple[bool, str] | None = None
_too_old: tuple[int, ...] = ()  # devices of a machine that has newer ones, too


@torch.compiler.assume_constant_result  # a graph that asks first would be traced again for what is known afterwards
def available() -> tuple[bool, str]:
    global _found
    if _found is None:
        _found = _look()
    return _found


def _look() -> tuple[bool, str]:
    global _too_old
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return False, f"triton cannot be imported ({error})"
    if _INTERPRETING:
        return True, ""
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    if torch.version.hip is not None:
        return False, "the kernels have not been checked on AMD GPUs"
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if max(capabilities) < _LEAST:
        return False, f"needs compute capability 8.0, this machine has {capabilities}"
    _too_old = tuple(index for index, capability in enumerate(capabilities) if capability < _LEAST)
    return True, ""


def misplaced(name: str, tensor: Tensor, interpreting: bool) -> str | None:
    """Why the kernels do not run where a tensor lies: not on a GPU, or on the one among several that is too old."""
    if not tensor.is_cuda and not interpreting:
        return f"{name} is on {tensor.device}, not on a CUDA device"
    if _too_old and tensor.get_device() in _too_old:
        return f"{name} is on {tensor.device}, whose compute capability is below 8.0"
    return None


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    if reason := misplaced("x", args.x, _INTERPRETING):
        return False, reason
    if args.b_up is not None and args.b_up.dim() == 2 and args.b_up.shape[0] > _MAX_BIAS_ROWS:
        return False, f"b_up has {args.b_up.shape[0]} rows, at most {_MAX_BIAS_ROWS} are taken"
    return takes(args)


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _adapter_kernels()
    if _on_current_device(args.x):
        return kernels.forward(_with_dense_ids(args))
    with torch.cuda.device(args.x.device):
        return kernels.forward(_with_dense_ids(args))


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    kernels = _adapter_kernels()
    if _on_current_device(args.x):
        return kernels.backward(_with_dense_ids(args), grad_out, mean, rstd, needs)
    with torch.cuda.device(args.x.device):
        return kernels.backward(_with_dense_ids(args), grad_out, mean, rstd, needs)


class _AdapterKernels(NamedTuple):
    forward: Callable[[AdapterArguments], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[AdapterArguments, Tensor, Tensor, Tensor, AdapterNeeds], AdapterGradients]


_kernels: _AdapterKernels | None = None


def _adapter_kernels() -> _AdapterKernels:
    """The kernels' modules, which import triton, once they have to run."""
    global _kernels
    if _kernels is None:
        from mosa_kernels.backends.triton.adapter_backward import adapter_backward
        from mosa_kernels.backends.triton.adapter_forward import adapter_forward

        _kernels = _AdapterKernels(adapter_forward, adapter_backward)
    return _kernels


def _on_current_device(x: Tensor) -> bool:
    return not x.is_cuda or x.get_device() == torch.cuda.current_device()


def _with_dense_ids(args: AdapterArguments) -> AdapterArguments:
    """The kernels step through ids and seeds one by one: a column of a table of ids is gathered first."""
    expert, seed = args.expert, args.seed
    if expert is not None and not expert.is_contiguous():
        args = args._replace(expert=expert.contiguous())
    if seed is not None and not seed.is_contiguous():
        args = args._replace(seed=seed.contiguous())
    return args
