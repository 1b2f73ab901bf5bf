"""Tables of addresses, and what the operators that read them decline, whatever is set around a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mosa_kernels.backends.arguments import AdapterArguments, expert_activity
from mosa_kernels.backends.consistency import ConsistencyArguments
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.merge import MergeInput
from mosa_kernels.backends.triton import backend

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import alignment, consistency, masked_adamw, merge, pointers

CPU = torch.device("cpu")


def test_a_table_is_made_on_the_host_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        table = pointers.upload([[1, 2], [3, 2**40]], CPU)
    assert table.tolist() == [[1, 2], [3, 2**40]]


def test_activity_is_float32_on_the_device_of_x_whatever_the_defaults_are() -> None:
    x, w = torch.zeros(2, 3), torch.zeros(3, 3)
    args = AdapterArguments(
        x, None, w, None, w, None, None, None, None, torch.tensor([1]), None, None, None, None, torch.zeros(3)
    )
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = expert_activity(args)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.tolist(), found.dtype) == ([0, 1, 0], torch.float32)


def test_every_operator_declines_the_one_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_too_old", (1,))
    old: Any = SimpleNamespace(device=torch.device("cuda", 1), is_cuda=True, get_device=lambda: 1)
    lists: list[Any] = [[old] for _ in AdamWTensors._fields]
    for ok, reason in (
        alignment.supports_feature_alignment([old], [old]),
        consistency.supports_consistency(ConsistencyArguments(old, old, old, 0.0, False)),
        masked_adamw.supports_masked_adamw(AdamWTensors(*lists), AdamWOptions(0.1, 0.9, 0.999, 1e-8, 0.0)),
        merge.supports_merge([MergeInput(old, None, old, None)], False, None),
    ):
        assert not ok
        assert "cuda:1, whose compute capability is below 8.0" in reason


def test_the_optimizer_shares_no_table_between_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a table that is let go is its stream's at once, though another's launch may still read it."""
    columns: list[Any] = [[torch.zeros(4, 4)] for _ in range(4)]
    tensors = AdamWTensors(*columns, [torch.zeros(())], [None], [None])
    stream = 1
    monkeypatch.setattr(masked_adamw, "_tables", type(masked_adamw._tables)())
    monkeypatch.setattr(masked_adamw, "_stream_of", lambda device: stream)
    first = masked_adamw._table_of(tensors)
    assert masked_adamw._table_of(tensors) is first
    stream = 2
    second = masked_adamw._table_of(tensors)
    assert second is not first
    assert second.tickets is not first.tickets
    assert masked_adamw._table_of(tensors) is second
    stream = 3
    monkeypatch.setattr(masked_adamw, "capturing", lambda device: True)  # a graph keeps what it reads
    monkeypatch.setattr(masked_adamw, "keep", lambda tensor: None)
    assert masked_adamw._table_of(tensors) is second
