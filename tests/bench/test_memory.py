"""Bytes that autograd keeps: each storage once, what exists anyway not at all."""

from __future__ import annotations

import gc
import weakref

import torch

from mosa_kernels.bench.adapter import Adapter
from mosa_kernels.bench.memory import peak_bytes, saved_bytes
from mosa_kernels.bench.shapes import Point


def test_what_is_kept_and_what_is_there_anyway() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x.sin(), [x]) == 0  # its input
    assert saved_bytes(lambda: x.exp(), [x]) == 400  # its output
    assert saved_bytes(lambda: x.sin(), []) == 400
    assert saved_bytes(lambda: (y := x.exp()) * y, [x]) == 400  # one storage, kept three times
    assert peak_bytes(lambda: x.exp(), torch.device("cpu")) is None


def test_the_fused_adapter_keeps_eight_bytes_a_token_and_the_eager_one_far_more() -> None:
    point = Point("swin_b_4", 3, 8, 2)
    prepared = {
        provider.name: provider.prepare()
        for provider in Adapter(point, torch.device("cpu")).case("both").providers()
        if provider.name in ("eager", "cpu")
    }
    saved = {name: saved_bytes(p.graph, p.own) for name, p in prepared.items() if p.graph is not None}
    assert saved["cpu"] == 8 * point.tokens
    assert saved["eager"] > point.tokens * point.width * 4  # the normalised tokens, and more


def test_what_was_kept_is_free_afterwards() -> None:
    """An operation that keeps its own output must not keep itself: a ViT-L's variants filled 23 GB."""
    x, outputs = torch.randn(4, 8, requires_grad=True), []

    def forward() -> torch.Tensor:
        out = x.softmax(-1)
        outputs.append(weakref.ref(out))
        return out.sum()

    assert saved_bytes(forward, [x]) == 4 * 8 * 4
    gc.collect()
    assert outputs[0]() is None
