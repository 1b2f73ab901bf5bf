"""What a model knows about its adapters follows the model, and lets go of it."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
from timm_models import images
from torch import nn

import mosa_kernels as mk


def _model() -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=2, embed_dim=48)
    return mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4, num_experts=2))


def test_a_dropped_model_is_free_at_once() -> None:
    gc.disable()
    try:
        model = _model()
        optimizer = mk.MoSAAdamW(model, lr=1e-3)
        out = mk.two_pass(model, torch.randn(2, 3, 32, 32))
        mk.MoSALoss()(out, torch.tensor([0, 1])).backward()
        optimizer.step()
        alive = weakref.ref(model)
        weight = weakref.ref(next(iter(model.parameters())))
        del model, optimizer, out
        assert alive() is None
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "function",
    [
        mk.trainable_parameters,
        mk.merge_and_unload,
        mk.merge_adapter,
        mk.unmerge_adapter,
        lambda model: mk.set_adapter(model, "default"),
        lambda model: mk.two_pass(model, images()),
    ],
)
def test_what_is_no_model_is_named(function: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got NoneType"):
        function(None)


def test_copies_and_pickles_know_themselves() -> None:
    model = _model()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    del model
    for other in again:
        assert mk.trainable_parameters(other).total > 0
        assert mk.merge_and_unload(other)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
