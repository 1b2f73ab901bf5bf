"""Fresh memory that holds NaN, so that what a kernel forgets to write is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# A NaN, as are its halves, that no computation gives: kernels watched on the host
# (cuda_on_host/races.h) know by it what nobody has written.
POISON = 0x7FFD7FFD
WORDS = {2: (torch.int16, POISON & 0xFFFF), 4: (torch.int32, POISON), 8: (torch.int64, POISON << 32 | POISON)}


def poison(fresh: Tensor) -> Tensor:
    """Fills a tensor of floating point numbers; others are left as they are."""
    if fresh.is_floating_point():
        words, value = WORDS[fresh.element_size()]
        with torch.no_grad():
            fresh.view(words).fill_(value)
    return fresh


@contextmanager
def poisoned_memory() -> Iterator[None]:
    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
