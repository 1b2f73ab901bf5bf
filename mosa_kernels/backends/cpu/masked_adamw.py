"""One step of AdamW on the active entries of all parameters, on the CPU, compiled from csrc/masked_adamw.cpp."""

from __future__ import annotations

import torch

from mosa_kernels._extension import extension
from mosa_kernels.backends.cpu.compiled import available
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.masked_adamw_kernels import numbers_of, takes

__all__ = ["available", "masked_adamw", "supports_masked_adamw"]

_STORED = ("params", "exp_avgs", "exp_avg_sqs")


def supports_masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> tuple[bool, str]:
    """Whether the kernel takes this step, and if not, why."""
    device = tensors.params[0].device
    if device.type != "cpu":
        return False, f"params[0] is on {device}, not on a CPU"
    return takes(tensors, options, strided=True)


def masked_adamw(tensors: AdamWTensors, options: AdamWOptions) -> None:
    """One step, in place, on as many threads as PyTorch uses; their number does not change the result."""
    module = extension().module
    assert module is not None
    inside = _contiguous(tensors)
    numbers, _copies = numbers_of(inside)
    lr, beta1, beta2, eps, weight_decay = options
    module.masked_adamw_cpu(
        numbers,
        lr=float(lr),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        threads=torch.get_num_threads(),
    )
    if inside is not tensors:
        for name in _STORED:
            for mine, copied in zip(getattr(tensors, name), getattr(inside, name), strict=True):
                if copied is not mine:
                    mine.copy_(copied)


def _contiguous(tensors: AdamWTensors) -> AdamWTensors:
    """Copies of what the kernel cannot walk through, such as the parameters of a model in channels_last."""
    columns = {name: getattr(tensors, name) for name in _STORED}
    if all(tensor.is_contiguous() for column in columns.values() for tensor in column):
        return tensors
    return tensors._replace(**{name: [t.contiguous() for t in column] for name, column in columns.items()})
