"""What holds two passes of one batch together: alignment of features and consistency of predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_alignment(features1: Sequence[Tensor], features2: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference of two features (arXiv 2312.02923, the last term of Eq. 6).

    Args:
        features1, features2: floating point, one tensor a layer; shapes may differ from layer to layer.

    Returns:
        Tensor [], float32, or float64 for float64 features.

    Raises:
        ValueError: the lists are empty or differ in length, or the shapes of a layer differ.
    """
    if len(features1) != len(features2) or not features1:
        raise ValueError(
            f"features2: expected as many layers as features1, at least one, got {len(features2)} and {len(features1)}"
        )
    for layer, (first, second) in enumerate(zip(features1, features2, strict=True)):
        if first.shape != second.shape:
            raise ValueError(
                f"features2[{layer}]: expected the shape of features1[{layer}], {list(first.shape)}, "
                f"got {list(second.shape)}"
            )
    # Each layer's mean is taken in float32: squares of 16-bit activations overflow.
    return torch.stack(
        [
            (at_least_float32(first) - at_least_float32(second)).square().mean()
            for first, second in zip(features1, features2, strict=True)
        ]
    ).sum()


def symmetric_kl(logits1: Tensor, logits2: Tensor, detach_targets: bool = False) -> Tensor:
    """``KL(p1 || p2) + KL(p2 || p1)`` over the classes, mean over the batch (arXiv 2312.02923, Eq. 6).

    Args:
        logits1, logits2: [B, C], floating point; computed in float32 at least.
        detach_targets: whether the first distribution of each divergence is a constant.

    Returns:
        Tensor [], float32, or float64 for float64 logits.

    Raises:
        ValueError: the shapes are not the same [B, C].
    """
    if logits1.dim() != 2 or logits1.shape != logits2.shape:
        raise ValueError(
            f"logits2: expected the shape [B, C] of logits1, got {list(logits2.shape)} and {list(logits1.shape)}"
        )
    log_p1 = F.log_softmax(at_least_float32(logits1), 1)
    log_p2 = F.log_softmax(at_least_float32(logits2), 1)
    if detach_targets:
        target1, target2 = log_p1.detach(), log_p2.detach()
        terms = target1.exp() * (target1 - log_p2) + target2.exp() * (target2 - log_p1)
    else:
        terms = (log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)  # both divergences, and never below zero
    return terms.sum() / logits1.shape[0]


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
