"""A linear layer whose weight is one dense tensor with an owner per entry."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mosa_kernels.nn.activity import ExpertActivity
from mosa_kernels.shards import whole

_PROJECTIONS = WeakTensorKeyDictionary()
_MADE: weakref.WeakSet[Projection] = weakref.WeakSet()


class Projection(nn.Module):
    """Weight, bias and owners of a down- or up-projection; the adapter computes with them.

    Args:
        in_features, out_features: sizes, as in `torch.nn.Linear`.
        assignment: uint8 [out, in], the owner of each entry, or None for a dense projection.
        bias_rows: None for one shared bias [out], or N for one per expert [N, out].
        initial: whether the values at the start are kept as what an expert sees outside its own entries; without it
            an expert sees zeros there.
        has_bias: whether there is a bias at all.
        activity: of the adapter that this projection is part of; None where there are no experts.

    Attributes:
        weight: [out, in].
        bias: [out] or [N, out], or None.
        assignment: uint8 [out, in], a buffer, or None.
        initial: [out, in], a buffer, or None.
        activity: reports which experts ran, or None.
    """

    weight: nn.Parameter
    bias: Any  # nn.Parameter, or None in a projection without one: adapters have theirs
    assignment: Tensor | None
    initial: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        assignment: Tensor | None = None,
        *,
        bias_rows: int | None = None,
        initial: bool = False,
        has_bias: bool = True,
        activity: ExpertActivity | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.activity = activity
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))
        bias_shape = (out_features,) if bias_rows is None else (bias_rows, out_features)
        bias = nn.Parameter(torch.zeros(bias_shape, device=device, dtype=dtype)) if has_bias else None
        self.register_parameter("bias", bias)
        self.register_buffer("assignment", None if assignment is None else assignment.to(self.weight.device))
        self.register_buffer("initial", torch.zeros_like(self.weight) if initial else None)

    def reset_kaiming(self) -> None:
        """Kaiming-uniform (a = sqrt 5) weights, as `torch.nn.Linear`, and zero biases."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.initial is not None:
            self.initial.copy_(whole(self.weight.detach()))

    def _register(self) -> None:
        """Lets `projection_of` find this module by its parameters, also after a copy or a move."""
        _MADE.add(self)
        for parameter in self._parameters.values():
            if parameter is not None:
                _PROJECTIONS[parameter] = weakref.ref(self)

    @contextmanager
    def _refers_to_nothing(self) -> Iterator[None]:
        """Within the context no reference is left to the parameters: PyTorch swaps only tensors that nothing refers to
        weakly, and it swaps those that are made of others (sharded ones)."""
        for parameter in self._parameters.values():
            if parameter is not None:
                _PROJECTIONS.pop(parameter, None)
        try:
            yield
        finally:
            self._register()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._register()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As every module; owners of another number of experts, which no shape need show, are an error."""
        owners = state_dict.get(prefix + "assignment")
        if isinstance(owners, Tensor) and self.activity is not None and not owners.is_meta and owners.numel():
            expected, counts = self.activity.num_experts, owners.flatten().bincount()
            found = len(counts)
            # A split by hand may leave the last experts without entries; one for fewer experts shares all out evenly.
            fewer = 1 < found < expected and int(counts.max() - counts.min()) <= max(owners.shape)
            if found > expected or fewer:
                error_msgs.append(
                    f"{prefix}assignment: expected owners for num_experts={expected}, got {found} experts"
                )
                return
        with self._refers_to_nothing():
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Projection:
        with self._refers_to_nothing():
            super()._apply(fn, recurse)
        if self.activity is not None:
            self.activity.move(self.weight.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def extra_repr(self) -> str:
        owners = "dense" if self.assignment is None else "split"
        bias = None if self.bias is None else list(self.bias.shape)
        return f"in_features={self.in_features}, out_features={self.out_features}, {owners}, bias={bias}"


def taken_in_turns(parameter: Tensor) -> Projection | None:
    """The projection whose experts own this weight's entries or this bias's rows; None where no experts take turns."""
    projection = projection_of(parameter)
    if projection is None or projection.activity is None:
        return None
    rows = parameter is projection.bias and parameter.dim() == 2
    entries = parameter is projection.weight and projection.assignment is not None
    return projection if rows or entries else None


def projection_of(parameter: Tensor) -> Projection | None:
    """The projection that a weight or bias belongs to, or None for a parameter of another kind."""
    found = _PROJECTIONS.get(parameter)
    if found is not None:
        return found()
    # Sharding puts new parameters into a module without a call that it would notice.
    for projection in _MADE:
        if any(parameter is mine for mine in projection._parameters.values()):
            projection._register()
            return projection
    return None
