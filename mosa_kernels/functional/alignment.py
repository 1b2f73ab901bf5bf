"""Alignment of the features of two passes of one batch (arXiv 2312.02923, the last term of Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mosa_kernels.backends import alignment as reference
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.triton import backend as triton
from mosa_kernels.functional.checks import check_floating
from mosa_kernels.functional.derivatives import definition_gradients

LIBRARY = torch.library.Library("mosa_kernels", "FRAGMENT")
LIBRARY.define("feature_alignment(Tensor[] features1, Tensor[] features2, str backend) -> Tensor")
LIBRARY.define(
    "feature_alignment_backward(Tensor grad, Tensor[] features1, Tensor[] features2, bool[] needs, str backend) -> "
    "Tensor[]"
)


def _triton() -> ModuleType:
    from mosa_kernels.backends.triton import alignment as kernels

    return kernels


def _kind(features1: Sequence[Tensor], features2: Sequence[Tensor]) -> Kind:
    first = features1[0]
    return "feature_alignment", first.device, first.dtype, len(features1), first.numel()


OPERATOR = Operator(
    "feature_alignment",
    {
        "reference": Backend(reference.available, lambda: reference),
        "triton": Backend(triton.available, _triton),
    },
    {},
    kind=_kind,
)
"""On CUDA one launch each way, where the reference makes some seven a layer; it runs where it was measured to be
faster, or when asked for (see `backends.choice.ADAPTER`)."""


def _forward_kernel(features1: list[Tensor], features2: list[Tensor], backend: str) -> Tensor:
    return OPERATOR.run(backend, features1, features2)


def _empty_gradients(features1: list[Tensor], features2: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """One for each feature, of the first pass and then of the second, empty where it is not needed."""
    together = zip((*features1, *features2), needs, strict=True)
    return [feature.new_empty(feature.shape if needed else (0,)) for feature, needed in together]


def _backward_kernel(
    grad: Tensor, features1: list[Tensor], features2: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    grads = _empty_gradients(features1, features2, needs)
    wanted = [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
    count = len(features1)
    module = OPERATOR.backends[backend].load()
    module.feature_alignment_backward(grad, features1, features2, wanted[:count], wanted[count:])
    return grads


def _forward_fake(features1: list[Tensor], features2: list[Tensor], backend: str) -> Tensor:
    return features1[0].new_empty((), dtype=torch.float32)


def _backward_fake(
    grad: Tensor, features1: list[Tensor], features2: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return _empty_gradients(features1, features2, needs)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("feature_alignment", _forward_kernel, _device)
    LIBRARY.impl("feature_alignment_backward", _backward_kernel, _device)
torch.library.register_fake("mosa_kernels::feature_alignment", _forward_fake, lib=LIBRARY)
torch.library.register_fake("mosa_kernels::feature_alignment_backward", _backward_fake, lib=LIBRARY)
_forward_op = torch.ops.mosa_kernels.feature_alignment.default
_backward_op = torch.ops.mosa_kernels.feature_alignment_backward.default


class _FeatureAlignment(torch.autograd.Function):
    """Saves the features, which the model keeps anyway."""

    @staticmethod
    def forward(ctx: Any, backend: str, *features: Tensor) -> Tensor:
        ctx.save_for_backward(*features)
        ctx.backend = backend
        count = len(features) // 2
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(list(features[:count]), list(features[count:]), backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features = ctx.saved_tensors
        count = len(features) // 2
        needs = list(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            return None, *definition_gradients(
                lambda both: reference.feature_alignment(both[:count], both[count:]),  # type: ignore[arg-type]
                features,
                needs,
                [grad],
            )
        grads = _backward_op(grad, list(features[:count]), list(features[count:]), needs, ctx.backend)
        return None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _autograd_kernel(features1: list[Tensor], features2: list[Tensor], backend: str) -> Tensor:
    return _FeatureAlignment.apply(backend, *features1, *features2)


LIBRARY.impl("feature_alignment", _autograd_kernel, "Autograd")


def feature_alignment(
    features1: Sequence[Tensor], features2: Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """Sum over layers of the mean squared difference of two features (arXiv 2312.02923, the last term of Eq. 6).

    Args:
        features1, features2: floating point, one tensor a layer; shapes may differ from layer to layer. Two halves of
            one tensor need no copy.
        backend: None for the automatic choice, "reference" or "triton": one launch forward and one backward.

    Returns:
        Tensor [], float32, or float64 for float64 features.

    Raises:
        TypeError: an argument is no list or tuple, or a feature is not floating point.
        ValueError: the lists are empty or differ in length, the shapes of a layer differ, or the backend asked for
            does not take these features.
    """
    for name, features in (("features1", features1), ("features2", features2)):
        if not isinstance(features, Sequence):  # a tensor would be taken for a list of its rows
            raise TypeError(f"{name}: expected a list of tensors, one a layer, got {type(features).__name__}")
    if len(features1) != len(features2) or len(features1) == 0:
        raise ValueError(
            f"features2: expected as many layers as features1, at least one, got {len(features2)} and {len(features1)}"
        )
    for layer, (first, second) in enumerate(zip(features1, features2, strict=True)):
        check_floating(f"features1[{layer}]", first)
        check_floating(f"features2[{layer}]", second)
        if first.shape != second.shape:
            raise ValueError(
                f"features2[{layer}]: expected the shape of features1[{layer}], {list(first.shape)}, "
                f"got {list(second.shape)}"
            )
    name = OPERATOR.choose(features1[0].device.type, backend, features1, features2)
    if name == "reference":
        return reference.feature_alignment(features1, features2)
    return torch.ops.mosa_kernels.feature_alignment(list(features1), list(features2), name)
