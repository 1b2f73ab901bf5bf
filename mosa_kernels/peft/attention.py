"""Low-rank updates within timm's attention: which rows of which linear layer are query, key, value and output.

timm has one fused layer `qkv`, or `q` and `kv`, or a layer for each (`q`, `k` and `v`, or `q_proj` and so on). Where
the fused one has biases of its own for query and value (BEiT, EVA, Swin v2), attention multiplies by its weight without
calling it. See LoRA, arXiv 2106.09685, and MoSL, arXiv 2312.02923, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.peft.placement import forward_class
from mosa_kernels.peft.plain import SequentialAdapter
from mosa_kernels.peft.view import ModuleView

ATTENTIONS = frozenset(
    f"timm.{name}"
    for name in (
        "layers.attention.Attention",
        "layers.attention.AttentionRope",
        "layers.diff_attention.DiffAttention",
        "models.beit.Attention",
        "models.cait.ClassAttn",
        "models.cait.TalkingHeadAttn",
        "models.eva.EvaAttention",
        "models.hiera.MaskUnitAttention",
        "models.hieradet_sam2.MultiScaleAttention",
        "models.mvitv2.MultiScaleAttention",
        "models.nest.Attention",
        "models.pvt_v2.Attention",
        "models.swin_transformer.WindowAttention",
        "models.swin_transformer_v2.WindowAttention",
        "models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        "models.twins.GlobalSubSampleAttn",
        "models.twins.LocallyGroupedAttn",
        "models.vision_transformer.Attention",
        "models.vision_transformer_relpos.RelPosAttention",
        "models.vision_transformer_sam.Attention",
    )
)
"""The attention modules whose projections are known."""

_BY_LETTERS = ("qkv", "kv", "q", "k", "v")  # layers named after what they compute, in the order of their rows


class Projected(NamedTuple):
    """The rows of a linear layer that a low-rank update goes to."""

    layer: str  # its name in attention
    start: int
    rows: int
    columns: int


def find_attention(block: nn.Module) -> nn.Module:
    """The attention of a block.

    Raises:
        ValueError: it has none of its own, one around which an adapter was merged, or one whose projections are not
            known.
    """
    attention = getattr(block, "attn", None)
    if not isinstance(attention, nn.Module):
        raise ValueError(f"{forward_class(block).__name__} has no attention as a module of its own")
    if isinstance(attention, SequentialAdapter):
        raise ValueError("an adapter was merged around its attention before; take the model as it was before that")
    cls = forward_class(attention)
    if f"{cls.__module__}.{cls.__qualname__}" not in ATTENTIONS:
        raise ValueError(f"the projections of {cls.__module__}.{cls.__qualname__} are not known")
    return attention


def projected(attention: nn.Module, target: str) -> Projected:
    """Where "q", "k", "v" or "proj" is computed.

    Raises:
        ValueError: not by a linear layer.
    """
    name = _layer_of(attention, target)
    layer = getattr(attention, name, None)
    if not isinstance(layer, nn.Linear):
        cls = type(layer)
        raise ValueError(f"expected a torch.nn.Linear as {name}, got {cls.__module__}.{cls.__qualname__}")
    parts = _parts(name, target)
    rows = layer.out_features // len(parts)
    return Projected(name, parts.index(target) * rows, rows, layer.in_features)


def _layer_of(attention: nn.Module, target: str) -> str:
    """The name of the layer that computes a target."""
    if target == "proj":
        return target
    named = (name for name in _BY_LETTERS if target in name and getattr(attention, name, None) is not None)
    return next(named, f"{target}_proj")


def _parts(name: str, target: str) -> tuple[str, ...]:
    """What the layer of that name computes, in the order of its rows."""
    return tuple(name) if name in _BY_LETTERS else (target,)


def updated_attention(attention: Any, updates: Mapping[str, Callable[..., Tensor]], images: int) -> ModuleView:
    """Attention whose projections come with updates.

    Args:
        attention: of `find_attention`.
        updates: by target.
        images: how many there are in the batch; with windows, attention's own first dimension is a multiple of it.
    """
    view: Any = ModuleView(attention)
    layers = {_layer_of(attention, target): target for target in updates}
    for name, target in layers.items():
        layer = partial(_qkv, attention) if name == "qkv" else getattr(attention, name)
        setattr(view, name, _updated(layer, [updates.get(part) for part in _parts(name, target)], images))
    if "qkv" in layers and getattr(attention, "q_bias", None) is not None:
        view.q_bias = None  # now attention calls what stands in for its layer
    return view


def _updated(
    layer: Callable[[Tensor], Tensor], updates: Sequence[Callable[..., Tensor] | None], images: int
) -> Callable[[Tensor], Tensor]:
    """The layer with an update, or none, for each of the equal parts of its rows."""

    def run(x: Tensor) -> Tensor:
        parts = list(layer(x).chunk(len(updates), -1))
        for number, update in enumerate(updates):
            if update is not None:
                part = update(x, residual=parts[number], add_input=False, samples=images)
                parts[number] = part.to(parts[number].dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    return run


def _qkv(attention: Any, x: Tensor) -> Tensor:
    """The fused layer as timm computes it."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv(x)
    bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    if attention.qkv_bias_separate:
        return attention.qkv(x) + bias
    return F.linear(x, attention.qkv.weight, bias)
