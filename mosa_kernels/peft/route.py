"""Several adapters in one forward pass: each image of a batch goes through its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Routes:
    """Which images of a batch go where.

    Args:
        names: an adapter for each image.
        device: where the images are.

    Attributes:
        images: how many.
        groups: adapter name -> the numbers of its images, int64.
        inverse: puts the groups, one after the other, back into the order of the batch, int64 [images].
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.images = len(names)
        self.groups = {
            name: torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
            for name in dict.fromkeys(names)
        }
        self.inverse = torch.cat(list(self.groups.values())).argsort()

    def rows(self, x: Tensor, group: Tensor) -> Tensor:
        """A group's share of x [images * m, ...], images one after the other."""
        if x.shape[0] == self.images:
            return x.index_select(0, group)
        return x.unflatten(0, (self.images, -1)).index_select(0, group).flatten(0, 1)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `rows` over all groups."""
        out = torch.cat(parts)
        if out.shape[0] == self.images:
            return out.index_select(0, self.inverse)
        return out.unflatten(0, (self.images, -1)).index_select(0, self.inverse).flatten(0, 1)


class RoutedAdapter:
    """An adapter's place in a block where each image meets its own; an image without one passes by."""

    def __init__(self, routes: Routes, adapters: dict[str, nn.Module]) -> None:
        self.routes = routes
        self.adapters = adapters

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, add_input: bool = True, samples: int | None = None
    ) -> Tensor:
        parts = []
        for name, group in self.routes.groups.items():
            mine = self.routes.rows(x, group)
            rest = None if residual is None else self.routes.rows(residual, group)
            adapter = self.adapters.get(name)
            if adapter is None:
                parts.append(_sum(mine if add_input else None, rest))
                continue
            options: dict[str, Any] = {} if samples is None else {"samples": group.numel()}
            parts.append(adapter(mine, residual=rest, add_input=add_input, **options))
        return self.routes.joined(parts)


class RoutedHead(nn.Module):
    """The classifiers of several tasks; tasks with fewer classes than others get -inf for those that they lack."""

    def __init__(self, routes: Routes, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.routes = routes
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.heads[name](self.routes.rows(x, group)) for name, group in self.routes.groups.items()]
        most = max(part.shape[-1] for part in parts)
        filled: list[Tensor] = [
            nn.functional.pad(part, (0, most - part.shape[-1]), value=float("-inf")) for part in parts
        ]
        return self.routes.joined(filled)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        found = second if first is None else first
        assert found is not None
        return found
    return first + second


def routed_sites(routes: Routes, found: dict[str, nn.ModuleDict]) -> dict[str, Callable[..., Tensor]]:
    """By site, of the adapters in a block by name."""
    sites = dict.fromkeys(site for adapters in found.values() for site in adapters)
    return {
        site: RoutedAdapter(routes, {name: adapters[site] for name, adapters in found.items() if site in adapters})
        for site in sites
    }
