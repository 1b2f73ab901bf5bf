"""How an optimizer learns which experts took part in a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExpertActivity:
    """Which experts of one adapter ran, reported by every backward pass; its two projections share one.

    Copies and pickles of it report nothing until they are asked to.

    Attributes:
        num_experts: N.
        leaf: float32 [N], receives as its gradient 1 for each expert that ran; None until `track` was called. It stays
            the same tensor, hooks included, when the module moves to another device, unless that is the meta device.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.leaf: Tensor | None = None

    def track(self, device: torch.device) -> Tensor:
        """Has each backward pass report from now on, and returns the leaf."""
        if self.leaf is None:
            self.leaf = self._zeros(device).requires_grad_()
        self.move(device)
        return self.leaf

    def move(self, device: torch.device) -> None:
        if self.leaf is None or self.leaf.device == device:
            return
        moved = self._zeros(device)
        if torch._has_compatible_shallow_copy_type(self.leaf, moved):
            self.leaf.grad = None
            self.leaf.data = moved
        else:  # from or to the meta device; the parameters become others too
            self.leaf = moved.requires_grad_()

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self.num_experts, dtype=torch.float32, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_experts": self.num_experts, "leaf": None}
