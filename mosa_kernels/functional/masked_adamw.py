"""The operator of `MoSAAdamW`: one step of AdamW on the entries of active experts (arXiv 2312.02923, Eq. 4)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends import masked_adamw as reference
from mosa_kernels.backends.cpu import masked_adamw as cpu
from mosa_kernels.backends.cuda import masked_adamw as cuda
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.triton import backend as triton
from mosa_kernels.functional.checks import check_floating


def _triton() -> ModuleType:
    from mosa_kernels.backends.triton import masked_adamw as kernels

    return kernels


def _kind(tensors: AdamWTensors, options: AdamWOptions) -> Kind:
    params = tensors.params
    return "masked_adamw", params[0].device, params[0].dtype, len(params), sum(p.numel() for p in params)


OPERATOR = Operator(
    "masked_adamw",
    {
        "reference": Backend(reference.available, lambda: reference),
        "cpu": Backend(cpu.available, lambda: cpu),
        "triton": Backend(triton.available, _triton),
        "cuda": Backend(cuda.available, lambda: cuda),
    },
    {"cpu": ("cpu",)},
    kind=_kind,
)
"""On CUDA each kernel is one launch where the reference makes some fifteen a parameter; they run where they were
measured to be faster, or when asked for (see `backends.choice.ADAPTER`)."""

_FLOATING = frozenset({"params", "grads", "exp_avgs", "exp_avg_sqs"})
_MAY_BE_NONE = frozenset({"owners", "active"})
_OPTIONS = ("lr", "betas[0]", "betas[1]", "eps", "weight_decay")


@torch.no_grad()
def masked_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    owners: Sequence[Tensor | None],
    active: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    backend: str | None = None,
) -> None:
    """One step of AdamW, in place, that leaves the entries of inactive experts and their moments as they are.

    Equal to `torch.optim.AdamW` on one copy of the parameter per expert, each of which sees its own entries and has
    no gradient in steps in which its expert was inactive. Moments of 16-bit parameters are updated in float32.

    Args:
        params: parameters of any shape, on one device, floating point.
        grads: their gradients, dense.
        exp_avgs, exp_avg_sqs: their moments, shaped like the parameters.
        steps: float32 step counts, counted up here: [] for an ordinary parameter, [N] for one with experts.
        owners: uint8, shaped like the parameter, the expert of each entry; None for an ordinary parameter, or for one
            of N rows of which row e belongs to expert e.
        active: shaped like `steps`, nonzero where the parameter or expert moves; None where all of it moves.
        lr: learning rate, a number or a tensor [].
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        backend: None for the automatic choice, or "reference", "cpu", "triton" or "cuda". The last three take float32,
            float16 and bfloat16; on a GPU in one launch, with nothing read back by the host.

    Raises:
        TypeError: an item is no tensor, one that has to be is not floating point, a gradient is sparse, counts are not
            float32, or an owner is not uint8.
        ValueError: a shape, a device, an option or the length of a list is wrong, or the backend asked for does not
            take this call.
    """
    tensors = AdamWTensors(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(owners), list(active)
    )
    OPERATOR.check_name(backend)
    if not tensors.params:
        return
    if len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}")
    options = AdamWOptions._make(_scalar(option) for option in (lr, *betas, eps, weight_decay))
    _check(tensors)
    _check_options(options)
    name = OPERATOR.choose(tensors.params[0].device.type, backend, tensors, options)
    OPERATOR.run(name, tensors, options)
    if name != "reference" and not torch.compiler.is_compiling():
        # The kernels write to addresses: autograd has to know, for a graph that is differentiated once more.
        torch.autograd.graph.increment_version([param for param in tensors.params if not param.is_inference()])


def _scalar(option: Any) -> Any:
    """A tensor of one number as [], so that it has no say in dtypes; NumPy's numbers as Python's."""
    if isinstance(option, Tensor):
        return option.reshape(()) if option.numel() == 1 else option
    if isinstance(option, (int, float)):
        return option
    return float(option) if isinstance(option, numbers.Real) else option


def _check(tensors: AdamWTensors) -> None:
    count = len(tensors.params)
    lengths = {name: len(column) for name, column in tensors._asdict().items()}
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"{name}: expected {count} items, as params, got {length}")
    if not _are_alike(tensors):
        for name, column in tensors._asdict().items():
            for index, tensor in enumerate(column):
                if tensor is not None or name not in _MAY_BE_NONE:
                    _check_tensor(name, index, tensor, tensors.params[0])
    for index, (p, grad, exp_avg, exp_avg_sq, steps, owner, active) in enumerate(zip(*tensors, strict=True)):
        shape = p.shape
        if grad.layout != torch.strided:
            raise TypeError(f"grads[{index}]: expected a dense gradient, got layout {grad.layout}")
        if grad.shape != shape or exp_avg.shape != shape or exp_avg_sq.shape != shape:
            got = f"{list(grad.shape)}, {list(exp_avg.shape)} and {list(exp_avg_sq.shape)}"
            raise ValueError(
                f"grads, exp_avgs, exp_avg_sqs [{index}]: expected the parameter's shape {list(shape)}, got {got}"
            )
        if steps.dim() > 1 or (owner is None and steps.dim() == 1 and (p.dim() == 0 or shape[0] != steps.shape[0])):
            raise ValueError(
                f"steps[{index}]: expected shape [] or one count per row of {list(shape)}, got {list(steps.shape)}"
            )
        if owner is not None:
            if owner.dtype != torch.uint8:
                raise TypeError(f"owners[{index}]: expected torch.uint8, got {owner.dtype}")
            if owner.shape != shape or steps.dim() != 1:
                got = f"{list(owner.shape)} with steps {list(steps.shape)}"
                raise ValueError(f"owners[{index}]: expected shape {list(shape)} with steps [N], got {got}")
        if active is not None and active.shape != steps.shape:
            raise ValueError(
                f"active[{index}]: expected the shape of steps, {list(steps.shape)}, got {list(active.shape)}"
            )


def _are_alike(tensors: AdamWTensors) -> bool:
    """Whether `_check_tensor` would let all pass: in half of its time, and there is a check for each step."""
    numbers = [*tensors.params, *tensors.grads, *tensors.exp_avgs, *tensors.exp_avg_sqs]
    all_of_them = [*numbers, *tensors.steps, *(t for t in (*tensors.owners, *tensors.active) if t is not None)]
    return (
        all(isinstance(tensor, Tensor) for tensor in all_of_them)
        and all(tensor.dtype.is_floating_point for tensor in numbers)
        and all(tensor.dtype == torch.float32 for tensor in tensors.steps)
        and len({tensor.device for tensor in all_of_them}) == 1
    )


def _check_tensor(name: str, index: int, tensor: object, first: Tensor) -> None:
    if name in _FLOATING:
        check_floating(f"{name}[{index}]", tensor)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}[{index}]: expected a tensor, got {type(tensor).__name__}")
    if name == "steps" and tensor.dtype != torch.float32:
        raise TypeError(f"steps[{index}]: expected torch.float32, got {tensor.dtype}")
    if tensor.device != first.device:
        raise ValueError(f"{name}[{index}]: expected on {first.device} (as params[0]), got {tensor.device}")


def _check_options(options: AdamWOptions) -> None:
    """The values of numbers: those of tensors are not read back, and not looked at while a graph is made."""
    for name, value, end in zip(_OPTIONS, options, (math.inf, 1.0, 1.0, math.inf, math.inf), strict=True):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name}: expected a number or a tensor of shape [], got {list(value.shape)}")
        elif not torch.compiler.is_compiling() and not (isinstance(value, (int, float)) and 0 <= value < end):
            raise ValueError(f"{name}: expected a number of at least 0 and below {end:g}, got {value!r}")
