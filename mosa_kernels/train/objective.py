"""The loss of a batch, by one pass or two (arXiv 2312.02923, Eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.losses import MoSALoss
from mosa_kernels.peft import two_pass


@dataclass(frozen=True)
class Objective:
    """Images and labels to a loss.

    Args:
        passes: 1 for cross-entropy alone; 2 for Eq. 6 over two passes of each batch.
        criterion: Eq. 6; needed for two passes.
    """

    passes: int
    criterion: MoSALoss | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss by name, "loss" being the whole, and logits [B, classes] for the training accuracy."""
        if self.passes == 1 or self.criterion is None:
            logits = model(images)
            return {"loss": F.cross_entropy(logits.float(), labels)}, logits
        out = two_pass(model, images)
        parts = self.criterion.parts(out, labels)
        named = {"loss": parts.total, "loss_cross_entropy": parts.cross_entropy}
        if self.criterion.alpha:
            named["loss_consistency"] = parts.consistency
        if self.criterion.beta and self.criterion.align != "none":
            named["loss_alignment"] = parts.alignment
        return named, out.logits1
