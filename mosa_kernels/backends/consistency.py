"""Cross-entropy and the divergence of two predictions (arXiv 2312.02923, Eq. 6), in PyTorch: the definition."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mosa_kernels.backends.alignment import at_least_float32


class ConsistencyArguments(NamedTuple):
    logits1: Tensor  # [B, C]
    logits2: Tensor  # [B, C]
    target: Tensor  # classes [B] (uint8, int32 or int64), -100 for none, or probabilities [B, C]
    label_smoothing: float
    detach_targets: bool  # whether the first distribution of each divergence is a constant


def available() -> tuple[bool, str]:
    return True, ""


def supports_consistency(args: ConsistencyArguments) -> tuple[bool, str]:
    return True, ""


def consistency(args: ConsistencyArguments) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the first logits, and the symmetric divergence; differentiable any number of times."""
    return (
        cross_entropy(args.logits1, args.target, args.label_smoothing),
        symmetric_kl(args.logits1, args.logits2, args.detach_targets),
    )


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch; classes of -100 do not count."""
    logits = at_least_float32(logits)
    target = target.to(logits.dtype) if target.dtype.is_floating_point else target.long()
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


def symmetric_kl(logits1: Tensor, logits2: Tensor, detach_targets: bool) -> Tensor:
    """``KL(p1 || p2) + KL(p2 || p1)``, mean over the batch."""
    log_p1 = F.log_softmax(at_least_float32(logits1), 1)
    log_p2 = F.log_softmax(at_least_float32(logits2), 1)
    if detach_targets:
        target1, target2 = log_p1.detach(), log_p2.detach()
        terms = target1.exp() * (target1 - log_p2) + target2.exp() * (target2 - log_p1)
    else:
        terms = (log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)  # both divergences, and never below zero
    return terms.sum() / logits1.shape[0]
