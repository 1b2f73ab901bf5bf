"""Fresh memory that holds NaN, so that what a kernel forgets to write is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocated(*args: object, **kwargs: object) -> Tensor:
            fresh = allocate(*args, **kwargs)
            with torch.no_grad():
                return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        return allocated

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield
