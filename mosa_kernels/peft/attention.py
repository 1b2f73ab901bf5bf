"""Low-rank updates within timm's attention: which rows of which linear layer are query, key, value and output.

timm has one fused layer `qkv`, or `q_proj`, `k_proj` and `v_proj`; where the fused one has biases of its own for query
and value (BEiT, EVA, Swin v2), attention multiplies by its weight without calling it. See LoRA, arXiv 2106.09685, and
MoSL, arXiv 2312.02923, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.peft.placement import forward_class
from mosa_kernels.peft.view import ModuleView

ATTENTIONS = frozenset(
    f"timm.{name}"
    for name in (
        "layers.attention.Attention",
        "layers.attention.AttentionRope",
        "layers.diff_attention.DiffAttention",
        "models.beit.Attention",
        "models.eva.EvaAttention",
        "models.swin_transformer.WindowAttention",
        "models.swin_transformer_v2.WindowAttention",
        "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        "models.vision_transformer.Attention",
        "models.vision_transformer_relpos.RelPosAttention",
        "models.vision_transformer_sam.Attention",
    )
)
"""The attention modules whose projections are known."""

FUSED = ("q", "k", "v")  # the order of the rows of a fused layer


class Projected(NamedTuple):
    """The rows of a linear layer that a low-rank update goes to."""

    layer: str  # its name in attention
    start: int
    rows: int
    columns: int


def find_attention(block: nn.Module) -> nn.Module:
    """The attention of a block.

    Raises:
        ValueError: it has none of its own, or one whose projections are not known.
    """
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        raise ValueError(f"{forward_class(block).__name__} has no attention as a module of its own")
    cls = forward_class(attention)
    if f"{cls.__module__}.{cls.__qualname__}" not in ATTENTIONS:
        raise ValueError(f"the projections of {cls.__module__}.{cls.__qualname__} are not known")
    return attention


def projected(attention: nn.Module, target: str) -> Projected:
    """Where "q", "k", "v" or "proj" is computed.

    Raises:
        ValueError: not by a linear layer.
    """
    fused = target in FUSED and getattr(attention, "qkv", None) is not None
    name = "qkv" if fused else target if target == "proj" else f"{target}_proj"
    layer = getattr(attention, name, None)
    if not isinstance(layer, nn.Linear):
        cls = type(layer)
        raise ValueError(f"expected a torch.nn.Linear as {name}, got {cls.__module__}.{cls.__qualname__}")
    if not fused:
        return Projected(name, 0, layer.out_features, layer.in_features)
    rows = layer.out_features // 3
    return Projected(name, FUSED.index(target) * rows, rows, layer.in_features)


def updated_attention(attention: Any, updates: Mapping[str, Callable[..., Tensor]], images: int) -> ModuleView:
    """Attention whose projections come with updates.

    Args:
        attention: of `find_attention`.
        updates: by target.
        images: how many there are in the batch; with windows, attention's own first dimension is a multiple of it.
    """
    view: Any = ModuleView(attention)
    if getattr(attention, "qkv", None) is None:
        for target in FUSED:
            if target in updates:
                name = f"{target}_proj"
                setattr(view, name, _updated(getattr(attention, name), updates[target], images))
    elif any(target in updates for target in FUSED):
        view.qkv = _updated_qkv(attention, updates, images)
        if getattr(attention, "q_bias", None) is not None:
            view.q_bias = None  # now attention calls what stands in for its layer
    if "proj" in updates:
        view.proj = _updated(attention.proj, updates["proj"], images)
    return view


def _updated(layer: nn.Module, update: Callable[..., Tensor], images: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        out = layer(x)
        return update(x, residual=out, add_input=False, samples=images).to(out.dtype)

    return run


def _updated_qkv(
    attention: Any, updates: Mapping[str, Callable[..., Tensor]], images: int
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        out = _qkv(attention, x)
        parts = list(out.chunk(3, -1))
        for number, target in enumerate(FUSED):
            if target in updates:
                part = updates[target](x, residual=parts[number], add_input=False, samples=images)
                parts[number] = part.to(out.dtype)
        return torch.cat(parts, -1)

    return run


def _qkv(attention: Any, x: Tensor) -> Tensor:
    """The fused layer as timm computes it."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)
