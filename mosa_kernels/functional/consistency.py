"""What holds the predictions of two passes of one batch to each other and to the target (arXiv 2312.02923, Eq. 6)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends import consistency as reference
from mosa_kernels.backends.consistency import ConsistencyArguments
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.triton import backend as triton
from mosa_kernels.functional.checks import check_floating, has_no_values
from mosa_kernels.functional.derivatives import definition_gradients

LIBRARY = torch.library.Library("mosa_kernels", "FRAGMENT")
_NO_CLASS = -100  # as in PyTorch's cross-entropy
_ARGUMENTS = "Tensor logits1, Tensor logits2, Tensor target, float label_smoothing, bool detach_targets, str backend"
LIBRARY.define(f"consistency({_ARGUMENTS}) -> (Tensor cross_entropy, Tensor divergence, Tensor saved)")
LIBRARY.define(
    "consistency_backward(Tensor? grad_cross_entropy, Tensor? grad_divergence, Tensor saved, bool[] needs, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor)"
)


def _triton() -> ModuleType:
    from mosa_kernels.backends.triton import consistency as kernels

    return kernels


def _kind(args: ConsistencyArguments) -> Kind:
    logits = args.logits1
    return "consistency", logits.device, logits.dtype, logits.shape[1], logits.shape[0]


OPERATOR = Operator(
    "consistency",
    {
        "reference": Backend(reference.available, lambda: reference),
        "triton": Backend(triton.available, _triton),
    },
    {},
    kind=_kind,
)
"""On CUDA one launch each way, where the reference makes some twenty; it runs where it was measured to be faster, or
when asked for (see `backends.choice.ADAPTER`)."""


def _forward_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = arguments
    return OPERATOR.backends[backend].load().consistency_forward(ConsistencyArguments(*fields))


def _empty_gradients(logits1: Tensor, logits2: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """Empty where not needed."""
    return (
        logits1.new_empty(logits1.shape if needs[0] else (0,)),
        logits2.new_empty(logits2.shape if needs[1] else (0,)),
    )


def _backward_kernel(
    grad_cross_entropy: Tensor | None,
    grad_divergence: Tensor | None,
    saved: Tensor,
    needs: list[bool],
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    args = ConsistencyArguments(*fields)
    grads = _empty_gradients(args.logits1, args.logits2, needs)
    wanted = (grads[0] if needs[0] else None, grads[1] if needs[1] else None)
    module = OPERATOR.backends[backend].load()
    module.consistency_backward(args, saved, grad_cross_entropy, grad_divergence, wanted)
    return grads


def _forward_fake(logits1: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mosa_kernels.backends.triton.consistency import SAVED

    return (
        logits1.new_empty((), dtype=torch.float32),
        logits1.new_empty((), dtype=torch.float32),
        logits1.new_empty(SAVED * logits1.shape[0] + 1, dtype=torch.float32),
    )


def _backward_fake(
    grad_cross_entropy: Any, grad_divergence: Any, saved: Any, needs: list[bool], *arguments: Any
) -> tuple[Tensor, Tensor]:
    return _empty_gradients(arguments[0], arguments[1], needs)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("consistency", _forward_kernel, _device)
    LIBRARY.impl("consistency_backward", _backward_kernel, _device)
torch.library.register_fake("mosa_kernels::consistency", _forward_fake, lib=LIBRARY)
torch.library.register_fake("mosa_kernels::consistency_backward", _backward_fake, lib=LIBRARY)
_forward_op = torch.ops.mosa_kernels.consistency.default
_backward_op = torch.ops.mosa_kernels.consistency_backward.default


class _Consistency(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            cross_entropy, divergence, saved = _forward_op(*arguments)
        ctx.save_for_backward(saved, *arguments[:3])
        ctx.options = arguments[3:]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return cross_entropy, divergence, saved

    @staticmethod
    def backward(
        ctx: Any, grad_cross_entropy: Tensor | None, grad_divergence: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        saved, *tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            *fields, _ = ctx.options  # the backend comes last
            graph = definition_gradients(
                lambda seen: reference.consistency(ConsistencyArguments(*[*seen, *fields])),
                tensors,
                [*needs, False],
                [grad_cross_entropy, grad_divergence],
            )
            return *graph, None, None, None
        grads = _backward_op(grad_cross_entropy, grad_divergence, saved, needs, *tensors, *ctx.options)
        first, second = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return first, second, None, None, None, None


def _autograd_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _Consistency.apply(*arguments)


LIBRARY.impl("consistency", _autograd_kernel, "Autograd")


def consistency(
    logits1: Tensor,
    logits2: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    detach_targets: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first two terms of Eq. 6 (arXiv 2312.02923): the cross-entropy of the first pass, and `symmetric_kl`.

    Args:
        logits1, logits2: [B, C], floating point; computed in float32 at least.
        target: classes, int64, int32 or uint8 [B], where -100 names none and does not count, or probabilities,
            floating point [B, C].
        label_smoothing: of the cross-entropy, from 0 to 1.
        detach_targets: whether the first distribution of each divergence is a constant.
        backend: None for the automatic choice, "reference" or "triton": one launch forward and one backward.

    Returns:
        Two tensors [], float32, or float64 for float64 logits.

    Raises:
        TypeError: logits are not floating point, or the target has a dtype that names neither classes nor
            probabilities.
        ValueError: a shape, `label_smoothing` or (on the CPU) a class is wrong, or the backend asked for does not take
            this call.
    """
    _check_logits(logits1, logits2)
    check_target(logits1, target)
    check_smoothing(label_smoothing)
    args = ConsistencyArguments(logits1, logits2, target, label_smoothing, detach_targets)
    name = OPERATOR.choose(logits1.device.type, backend, args)
    if name == "reference":
        check_classes(logits1, target)
        return reference.consistency(args)
    cross_entropy, divergence, _ = torch.ops.mosa_kernels.consistency(*args, name)
    return cross_entropy, divergence


def symmetric_kl(logits1: Tensor, logits2: Tensor, detach_targets: bool = False) -> Tensor:
    """``KL(p1 || p2) + KL(p2 || p1)`` over the classes, mean over the batch (arXiv 2312.02923, Eq. 6).

    Args:
        logits1, logits2: [B, C], floating point; computed in float32 at least.
        detach_targets: whether the first distribution of each divergence is a constant.

    Returns:
        Tensor [], float32, or float64 for float64 logits.

    Raises:
        TypeError: logits are not floating point.
        ValueError: the shapes are not the same [B, C].
    """
    _check_logits(logits1, logits2)
    return reference.symmetric_kl(logits1, logits2, detach_targets)


def _check_logits(logits1: Tensor, logits2: Tensor) -> None:
    for name, logits in (("logits1", logits1), ("logits2", logits2)):
        check_floating(name, logits)
    if logits1.dim() != 2 or logits1.shape != logits2.shape:
        raise ValueError(
            f"logits2: expected the shape [B, C] of logits1, got {list(logits2.shape)} and {list(logits1.shape)}"
        )


def check_smoothing(label_smoothing: float) -> None:
    """
    Raises:
        ValueError: it is no number from 0 to 1.
    """
    if not isinstance(label_smoothing, (int, float)) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing!r}")


def check_target(logits: Tensor, target: Tensor) -> None:
    """Whether a target fits logits [B, C].

    Raises:
        TypeError: the logits are not floating point, or the target's dtype names neither classes nor probabilities.
        ValueError: a shape is wrong.
    """
    check_floating("logits1", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"logits1: expected shape [B, C], got {list(logits.shape)}")
    if target.dtype.is_floating_point:
        expected: tuple[int, ...] = tuple(logits.shape)
    elif target.dtype in (torch.int64, torch.int32, torch.uint8):
        expected = (logits.shape[0],)
    else:
        raise TypeError(f"target: expected classes (int64) or probabilities (floating point), got {target.dtype}")
    if tuple(target.shape) != expected:
        raise ValueError(f"target: expected shape {list(expected)} for {target.dtype}, got {list(target.shape)}")


def check_classes(logits: Tensor, target: Tensor) -> None:
    """What the definition is given on the CPU; a GPU would have to be waited for, and says so itself.

    Raises:
        ValueError: the target names a class that the logits do not have.
    """
    if target.dtype.is_floating_point or type(target) is not Tensor or not target.is_cpu or has_no_values():
        return
    classes, count = target.long(), logits.shape[1]
    unknown = classes[((classes < 0) | (classes >= count)) & (classes != _NO_CLASS)]
    if unknown.numel():
        raise ValueError(
            f"target: expected classes from 0 to {count - 1}, or {_NO_CLASS} for none, got {int(unknown[0])}"
        )
