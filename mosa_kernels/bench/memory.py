"""What a call keeps for its backward pass, and the most it holds at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once.

    Args:
        forward: runs with gradients on and returns what holds the graph.
        own: tensors that exist anyway (inputs, weights, masks) and do not count.
    """
    theirs = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation that keeps its output would keep itself, and never be free

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    size = sum(kept.values())
    del graph
    return size


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most a call allocates beyond what was there before; None on a CPU, whose allocator does not say."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
