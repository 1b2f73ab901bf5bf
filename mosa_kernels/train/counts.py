"""How many parameters a run trains, for its record."""

from __future__ import annotations

from torch import nn

from mosa_kernels.peft import trainable_parameters
from mosa_kernels.peft.book import find_book


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters, ready for JSON.

    Returned by name: "trained" (those that training can move: of a pruned adapter the kept ones), "adapter" (of these,
    as the paper counts: without head and further expert biases), "expert_biases" (one bias per expert costs this much
    more), "head", and "backbone" (frozen, without its head).
    """
    if find_book(model) is None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        return {"trained": trained, "adapter": 0, "expert_biases": 0, "head": trained, "backbone": total - trained}
    counts = trainable_parameters(model)
    return {
        "trained": counts.adapter.active + counts.expert_biases + counts.head,
        "adapter": counts.adapter.active,
        "expert_biases": counts.expert_biases,
        "head": counts.head,
        "backbone": counts.backbone,
    }
