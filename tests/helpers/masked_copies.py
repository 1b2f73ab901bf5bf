"""A parameter as the paper has it, one masked copy per expert, under `torch.optim.AdamW` in float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def masks_of(p: Tensor, num_experts: int | None, owner: Tensor | None) -> list[Tensor]:
    """The entries of each expert, as booleans shaped like the parameter."""
    if num_experts is None:
        return [torch.ones_like(p, dtype=torch.bool)]
    if owner is not None:
        return [owner == e for e in range(num_experts)]
    rows = torch.arange(num_experts).view(-1, *[1] * (p.dim() - 1))
    return [(rows == e).expand(p.shape) for e in range(num_experts)]


class MaskedCopies:
    """A parameter as the paper has it: one full copy per expert, seen through its mask."""

    def __init__(self, p: Tensor, masks: list[Tensor], **options: object) -> None:
        self.masks = masks
        self.copies = [torch.nn.Parameter(p.detach().double().clone()) for _ in masks]
        self.optimizers = [torch.optim.AdamW([copy], foreach=False, **options) for copy in self.copies]  # type: ignore[arg-type]

    def step(self, grad: Tensor, active: list[bool], lr: float) -> None:
        for copy, mask, optimizer, moves in zip(self.copies, self.masks, self.optimizers, active, strict=True):
            copy.grad = grad.double() * mask if moves else None
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    def together(self, name: str | None = None) -> Tensor:
        total = torch.zeros_like(self.copies[0])
        for copy, mask, optimizer in zip(self.copies, self.masks, self.optimizers, strict=True):
            value = copy.detach() if name is None else optimizer.state[copy].get(name, torch.zeros_like(copy))
            total += torch.where(mask, value, 0)
        return total


@st.composite
def parameters(draw: st.DrawFn) -> list[tuple[tuple[int, ...], int | None, bool]]:
    """Shape, number of experts (None: ordinary) and whether entries, not rows, have owners."""
    kinds = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(("ordinary", "entries", "rows")))
        num_experts = None if kind == "ordinary" else draw(st.integers(1, 5))
        shape = tuple(draw(st.lists(st.integers(1, 7), min_size=kind == "rows", max_size=3)))
        if kind == "rows":
            shape = (num_experts, *shape[1:])
        kinds.append((shape, num_experts, kind == "entries"))
    return kinds
