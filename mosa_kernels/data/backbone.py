"""Small backbones that ship with the package, pre-trained on the offline source task.

Importing this module registers them with timm, so that both of these work without a network:

    timm.create_model("vit_offline_patch8_32", pretrained=True, num_classes=10)
    load_offline_backbone(num_classes=10)

They take 32-pixel images and stand for the paper's ViT-B/16, ViT-L/16 and Swin-B:

vit_offline_patch8_32       timm's `VisionTransformer`: 128 wide, 4 blocks, 4 heads, a class token
vit_offline_deep_patch8_32  the same with twice the blocks
swin_offline_patch4_32      timm's `SwinTransformer`: 2 blocks 64 wide, 4 blocks 128 wide, windows of 4 x 4 tokens

each with a convolutional stem as `embed_layer`. `scripts/pretrain_offline_backbone.py` made the weights; the JSON file
beside each says how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers.patch_embed import PatchEmbed
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    swin_transformer,
    vision_transformer,
)
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

OFFLINE_BACKBONE = "vit_offline_patch8_32"
OFFLINE_BACKBONES = (OFFLINE_BACKBONE, "vit_offline_deep_patch8_32", "swin_offline_patch4_32")
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def weights_of(name: str) -> Path:
    """The file of an offline backbone's weights."""
    return ASSETS / f"{name}.safetensors"


def card_of(name: str) -> Path:
    """The file that says how they were made."""
    return weights_of(name).with_suffix(".json")


class ConvStem(PatchEmbed):
    """A patch embedding of 3x3 convolutions of stride 2, which sees edges before it sees patches.

    Takes what timm's `PatchEmbed` takes. Images [B, in_chans, H, W] become tokens [B, H/patch * W/patch, embed_dim].

    Args:
        widths: output channels of each convolution; 2 ** len(widths) has to be the patch size.
        **patch_embed: as for `timm.layers.PatchEmbed`.
    """

    def __init__(self, *, widths: Sequence[int] = (32, 64, 128), **patch_embed: Any) -> None:
        super().__init__(**patch_embed)
        if self.patch_size != (2 ** len(widths),) * 2:
            raise ValueError(
                f"patch_size: {len(widths)} convolutions of stride 2 make patches of {2 ** len(widths)} pixels, "
                f"got {self.patch_size}"
            )
        final = self.proj
        placement: dict[str, Any] = {"device": final.weight.device, "dtype": final.weight.dtype}
        layers: list[nn.Module] = []
        channels = final.in_channels
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False, **placement),
                nn.GroupNorm(1, width, **placement),
                nn.GELU(),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, final.out_channels, 1, bias=final.bias is not None, **placement))
        self.register_module("proj", nn.Sequential(*layers))


default_cfgs = generate_default_cfgs(
    {
        name: {
            "file": str(weights_of(name)),
            "num_classes": 32,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4) if name.startswith("swin") else None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "fixed_input_size": True,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "first_conv": "patch_embed.proj.0",
            "classifier": "head.fc" if name.startswith("swin") else "head",
            "license": "apache-2.0",
        }
        for name in OFFLINE_BACKBONES
    }
)


@register_model
def vit_offline_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The package's own ViT for 32-pixel images, 0.9 million parameters; takes what timm's ViTs take.

    Raises:
        FileNotFoundError: the shipped weights are missing.
        ValueError: the shipped weights are not the ones that their card names.
    """
    return _vit(OFFLINE_BACKBONE, 4, pretrained, kwargs)


@register_model
def vit_offline_deep_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The same with every block twice, 1.7 million parameters, pre-trained on from there. Raises the same."""
    return _vit("vit_offline_deep_patch8_32", 8, pretrained, kwargs)


@register_model
def swin_offline_patch4_32(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """The package's own Swin for 32-pixel images, 1 million parameters; takes what timm's take. Raises the same."""
    name = "swin_offline_patch4_32"
    architecture: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 64,
        "depths": (2, 4),
        "num_heads": (2, 4),
        "drop_path_rate": 0.0,
        "embed_layer": partial(ConvStem, widths=(32, 64)),
    }
    return build_model_with_cfg(
        SwinTransformer,
        name,
        _verified(name, pretrained, kwargs),
        pretrained_filter_fn=swin_transformer.checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1)},
        **{**architecture, **kwargs},
    )


def _vit(name: str, depth: int, pretrained: bool, kwargs: dict[str, Any]) -> VisionTransformer:
    architecture: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": depth,
        "num_heads": 4,
        "embed_layer": ConvStem,
    }
    return build_model_with_cfg(
        VisionTransformer,
        name,
        _verified(name, pretrained, kwargs),
        pretrained_filter_fn=vision_transformer.checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**architecture, **kwargs},
    )


def _verified(name: str, pretrained: bool, kwargs: dict[str, Any]) -> bool:
    """`pretrained`, after a look at the shipped weights where these are meant."""
    if pretrained and not any(kwargs.get(other) for other in ("pretrained_cfg", "pretrained_cfg_overlay")):
        verify_weights(weights_of(name), card_of(name))
    return pretrained


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_weights(weights: Path, card: Path) -> dict[str, Any]:
    """Checks a weights file against the SHA-256 in its card, and returns the card.

    Raises:
        FileNotFoundError: either file is missing.
        ValueError: the file is not the one that the card names.
    """
    for path in (weights, card):
        if not path.is_file():
            raise FileNotFoundError(f"the offline backbone's file {path} is missing: reinstall the package")
    described: dict[str, Any] = json.loads(card.read_text())
    found = file_hash(weights)
    if found != described["sha256"]:
        raise ValueError(
            f"{weights}: its SHA-256 is {found}, but {card.name} says {described['sha256']}; "
            "the file is damaged or was replaced: reinstall the package"
        )
    return described


def offline_backbone_card(name: str = OFFLINE_BACKBONE) -> dict[str, Any]:
    """How the shipped weights were made: architecture, command, seed, accuracy on the source task, hash."""
    card: dict[str, Any] = json.loads(card_of(name).read_text())
    return card


def load_offline_backbone(num_classes: int | None = None, **kwargs: Any) -> VisionTransformer:
    """The pre-trained backbone; a fresh head where `num_classes` is not the source task's 32.

    Args:
        num_classes: outputs of the head; None keeps the source task's head, 0 leaves it away.
        **kwargs: further arguments of timm's `VisionTransformer`.
    """
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return vit_offline_patch8_32(pretrained=True, **kwargs)
