"""Small members of timm's families of Transformers, with weights that hide nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models import build_model_with_cfg, mvitv2, nest, register_model
from torch import Tensor, nn

from mosa_kernels.peft.book import book_of

ALL = ("adaptformer", "pfeiffer", "houlsby", "lora")
ONLY = ("adaptformer",)

mvitv2.model_cfgs["small"] = mvitv2.MultiScaleVitCfg(
    depths=(1, 2), embed_dim=(16, 32), num_heads=(1, 2), stride_kv_adaptive=(2, 2)
)


@register_model
def nest_narrow(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's own take no other depths and widths."""
    narrow: dict[str, Any] = {"num_levels": 2, "embed_dims": (16, 32), "num_heads": (1, 2), "depths": (1, 2)}
    return build_model_with_cfg(nest.Nest, "nest_tiny", pretrained, **narrow, **kwargs)


class Family(NamedTuple):
    """One timm model, made small.

    Attributes:
        styles: the styles that its blocks take.
        since: the version of timm that can make it, where that is not the first one allowed.
    """

    name: str
    kwargs: dict[str, Any]
    styles: tuple[str, ...] = ALL
    since: tuple[int, ...] = ()

    @property
    def image_size(self) -> int:
        return int(self.kwargs.get("img_size", 32))


def _vit(
    name: str, size: int = 32, *, styles: tuple[str, ...] = ALL, since: tuple[int, ...] = (), **kwargs: Any
) -> Family:
    small = {"img_size": size, "depth": 2, "embed_dim": 48, "num_heads": 3, **kwargs}
    return Family(name, small, styles, since)


def _swin(name: str) -> Family:
    small = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return Family(name, small)


_STAGES = {"depths": (1, 2), "embed_dims": (16, 32), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1)}

FAMILIES = (
    _vit("vit_tiny_patch16_224"),
    _vit("vit_base_patch16_siglip_224"),
    _vit("vit_base_patch16_clip_quickgelu_224"),
    _vit("vit_small_patch14_dinov2", 28),
    _vit("vit_small_patch14_reg4_dinov2", 28),
    _vit("vit_small_patch16_dinov3"),
    _vit("vit_base_patch16_xp_224", styles=ONLY),
    _vit("vit_dpwee_patch16_reg1_gap_256", styles=ONLY, since=(1, 0, 23)),
    _vit("vit_small_patch16_18x2_224", styles=ONLY),
    _vit("vit_base_patch16_rpn_224"),
    _vit("vit_relpos_base_patch16_224"),
    _vit("vit_relpos_base_patch16_rpn_224"),
    _vit(
        "samvit_base_patch16_224", global_attn_indexes=(1,), window_size=1, styles=("adaptformer", "pfeiffer", "lora")
    ),
    _vit("deit_tiny_patch16_224"),
    _vit("deit_tiny_distilled_patch16_224"),
    _vit("deit3_small_patch16_224"),
    _vit("beit_base_patch16_224"),
    _vit("beitv2_base_patch16_224"),
    _vit("eva02_tiny_patch14_224", 28),
    _vit("eva02_enormous_patch14_clip_224", 28),
    Family("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    _swin("swin_tiny_patch4_window7_224"),
    _swin("swinv2_tiny_window8_256"),
    _swin("swinv2_cr_tiny_224"),
    _swin("swinv2_cr_giant_224"),
    _vit("cait_xxs24_224", depth_token_only=1),
    _vit("convit_tiny", embed_dim=12, num_heads=4, local_up_to_layer=1, styles=("adaptformer", "pfeiffer", "houlsby")),
    Family("gcvit_xxtiny", {"img_size": 32, "embed_dim": 16}, ("adaptformer", "pfeiffer", "houlsby")),
    Family(
        "hiera_tiny_224",
        {
            "img_size": 32,
            "embed_dim": 16,
            "stages": (1, 2),
            "q_pool": 1,
            "mask_unit_size": (2, 2),
            "mask_unit_attn": (True, False),
        },
    ),
    Family(
        "sam2_hiera_tiny",
        {"embed_dim": 16, "stages": (1, 2), "q_pool": 1, "window_spec": (4, 3), "global_att_blocks": ()},
        ("adaptformer", "pfeiffer", "lora"),
    ),
    Family("mvitv2_tiny", {"img_size": 32, "cfg_variant": "small"}),
    Family("nest_narrow", {"img_size": 32}),
    Family("pvt_v2_b0", _STAGES),
    Family("twins_svt_small", {"img_size": 32, **_STAGES, "depths": (2, 1), "wss": (4, 2)}),
)


def family_of(name: str) -> Family:
    """The first whose name begins so."""
    return next(family for family in FAMILIES if family.name.startswith(name))


VIT, SWIN = FAMILIES[0], family_of("swin_")


def make(family: Family = VIT, num_classes: int = 10, **kwargs: Any) -> nn.Module:
    """A model in evaluation mode; its seed is fixed, and no weight is zero or negligible."""
    if tuple(int(part) for part in timm.__version__.split(".")[:3]) < family.since:
        pytest.skip(f"timm {timm.__version__} cannot make {family.name}")
    torch.manual_seed(1)
    model = timm.create_model(family.name, pretrained=False, num_classes=num_classes, **{**family.kwargs, **kwargs})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(family: Family = VIT, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 3, family.image_size, family.image_size, generator=generator)


def train_a_little(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    """Gives every parameter of an adapter, or of a baseline, a value that can be seen, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        book = book_of(model)
        for _, _, adapter in book.adapters(name):
            for parameter in adapter.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
        for _, _, prompts in book.prompts(name):
            prompts.weight.add_(0.2 * torch.randn(prompts.weight.shape, generator=generator).to(prompts.weight))
        tuned = book.tuned_by(name)
        for path in [] if tuned is None else tuned.paths:
            value = model.get_parameter(path) if name == book.active else tuned.tensors()[path]
            value.add_(0.1 * torch.randn(value.shape, generator=generator).to(value))
