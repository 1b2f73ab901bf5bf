"""Gradients that can be differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Results = Tensor | Sequence[Tensor]


def definition_gradients(
    definition: Callable[[list[Tensor | None]], Results],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of an operator by its PyTorch definition, as part of the graph.

    A kernel's gradients are numbers without a history. Where the engine builds a graph of the backward pass
    (`create_graph=True`), these take their place: slower, and right in every further derivative. So they do where
    `grad_outputs` are many at a time (`is_grads_batched=True`), for which PyTorch's operators alone have rules.

    Args:
        definition: computes the operator's outputs from its tensors.
        tensors: what the operator was given; may hold a tensor twice.
        needs: which gradients are wanted.
        grad_outputs: of the outputs; None for an output that nothing depends on.

    Returns:
        A gradient for each tensor, None where it is not wanted or does not exist.
    """
    with torch.enable_grad():
        # Views, so that a tensor which is passed twice has a gradient for each place.
        seen = [t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needs, strict=True)]
        results = definition(seen)
        outputs = [results] if isinstance(results, Tensor) else list(results)
    wanted = [tensor for tensor, need in zip(seen, needs, strict=True) if need and tensor is not None]
    pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if grad is not None]
    if not wanted or not pairs:
        return [None] * len(seen)
    kept, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(kept, wanted, grads, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need and tensor is not None else None for tensor, need in zip(seen, needs, strict=True)]
