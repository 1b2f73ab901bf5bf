"""What a rank holds of a parameter that FSDP2 shards: a DTensor divided along its first dimension."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there is no such tensor
    return module is not None and isinstance(tensor, module.DTensor)


def check_sharding(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is whole, or divided along its first dimension alone, as by `fully_shard`."""
    if not is_sharded(tensor):
        return
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    if sum(placement.is_shard() for placement in placements) > 1 or any(
        not (placement.is_replicate() or placement.is_shard(0)) for placement in placements
    ):
        raise TypeError(
            f"{name}: expected whole tensors, or DTensors divided along their first dimension once, got "
            f"{list(tensor.shape)} with {tuple(placements)}"
        )


def check_unsharded(model: nn.Module, instead: str) -> None:
    """Raises ValueError if a parameter is sharded: what FSDP2 has divided it goes on putting where it was.

    Args:
        instead: what to do.
    """
    name = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if name is not None:
        raise ValueError(f"model: expected whole parameters, got {name} sharded by fully_shard; {instead}")


def whole(tensor: Tensor) -> Tensor:
    """What all ranks hold of a tensor together; of a sharded one every rank has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor, of a sharded one into this rank's rows."""
    if is_sharded(tensor):
        check_sharding("model", tensor)
        value = value[local_rows(tensor)]
    local_part(tensor).copy_(value)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows, in the same memory; a whole tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_rows(tensor: Tensor) -> slice:
    """Which of the tensor's rows this rank holds: as `torch.chunk` divides them."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if is_sharded(tensor):
        sharded: Any = tensor
        for dimension, placement in enumerate(sharded.placements):
            if placement.is_shard(0):
                size = -(-rows // sharded.device_mesh.size(dimension))
                first = min(size * sharded.device_mesh.get_local_rank(dimension), rows)
                return slice(first, min(first + size, rows))
    return slice(0, rows)
