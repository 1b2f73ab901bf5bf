"""The operator of `MoSAAdamW`: one step of AdamW on the entries of active experts (arXiv 2312.02923, Eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from mosa_kernels.backends import masked_adamw as reference
from mosa_kernels.backends.cpu import masked_adamw as cpu
from mosa_kernels.backends.cuda import masked_adamw as cuda
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.triton import backend as triton


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
        TypeError: a gradient is sparse, or an owner is not uint8.
        ValueError: a shape or the length of a list is wrong, or the backend asked for does not take this call.
    """
    tensors = AdamWTensors(
        list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(owners), list(active)
    )
    OPERATOR.check_name(backend)
    if not tensors.params:
        return
    _check(tensors)
    options = AdamWOptions(lr, *betas, eps, weight_decay)
    name = OPERATOR.choose(tensors.params[0].device.type, backend, tensors, options)
    OPERATOR.run(name, tensors, options)


def _check(tensors: AdamWTensors) -> None:
    count = len(tensors.params)
    lengths = {name: len(column) for name, column in tensors._asdict().items()}
    for name, length in lengths.items():
        if length != count:
            raise ValueError(f"{name}: expected {count} items, as params, got {length}")
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
