"""Which timm blocks are known, and where in them the residual stream meets the FFN."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from timm.models import FeatureDictNet
from torch import nn

from mosa_kernels.peft.plain import ParallelAdapter


class BlockKind(NamedTuple):
    """What has to be known of one class of transformer block.

    Attributes:
        branch: what the block applies to its residual stream x before it adds the result to x, in order. The first
            one's input is x as it enters the FFN's branch. "" is the block as a whole, a name ending in "[]" a list of
            branches, whose first one counts.
        ends_at: the module that takes the sum, where something follows it in the block; None: the sum is the output,
            or the first of a tuple that is.
        attention: what attention's output comes from, one token per position; None: it cannot be told apart.
        bypass: the module that x goes through beside the FFN in some blocks of the class, which adapters then do not
            fit; None: there is none.
    """

    branch: tuple[str, ...]
    ends_at: str | None = None
    attention: str | None = "attn"
    bypass: str | None = None

    @property
    def ffn(self) -> str | None:
        """The module whose output is the FFN's, or None where that cannot be told apart."""
        return "mlp" if "mlp" in self.branch else None


_PRE_NORM = BlockKind(("norm2", "mlp", "ls2"))
_PRE_NORM_BARE = BlockKind(("norm2", "mlp"))
_PRE_NORM_GAMMA = BlockKind(("norm2", "mlp", "gamma_2"))
_POST_NORM = BlockKind(("mlp", "norm2"))
_FUSED = BlockKind(("",), attention=None)  # one projection serves attention and FFN

KINDS: dict[str, BlockKind] = {
    "vision_transformer.Block": _PRE_NORM,
    "vision_transformer.ResPostBlock": _POST_NORM,
    "vision_transformer.ParallelScalingBlock": _FUSED,
    "vision_transformer.DiffParallelScalingBlock": _FUSED,
    "vision_transformer.ParallelThingsBlock": BlockKind(("ffns[]",), attention=None),
    "vision_transformer_relpos.RelPosBlock": _PRE_NORM,
    "vision_transformer_relpos.ResPostRelPosBlock": _POST_NORM,
    "vision_transformer_sam.Block": _PRE_NORM._replace(attention=None),  # attends within windows, pads them
    "beit.Block": _PRE_NORM_GAMMA,
    "eva.EvaBlock": _PRE_NORM_GAMMA,
    "eva.EvaBlockPostNorm": _POST_NORM,
    "swin_transformer.SwinTransformerBlock": _PRE_NORM_BARE._replace(attention="_attn"),
    "swin_transformer_v2.SwinTransformerV2Block": _POST_NORM._replace(attention="_attn"),
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock": BlockKind(
        ("mlp", "norm2"), ends_at="norm3", attention="_shifted_window_attn"
    ),
    "cait.LayerScaleBlock": _PRE_NORM_GAMMA,
    "cait.LayerScaleBlockClassAttn": _PRE_NORM_GAMMA,  # its stream is the class token
    "convit.Block": _PRE_NORM_BARE,
    "gcvit.GlobalContextVitBlock": _PRE_NORM._replace(attention="_window_attn"),
    "hiera.HieraBlock": _PRE_NORM,
    "hieradet_sam2.MultiScaleBlock": _PRE_NORM._replace(attention=None),  # attends within windows, pads them
    "mvitv2.MultiScaleBlock": _PRE_NORM_BARE._replace(bypass="shortcut_proj_mlp"),
    "nest.TransformerLayer": _PRE_NORM_BARE,
    "pvt_v2.Block": _PRE_NORM_BARE,
    "twins.Block": _PRE_NORM_BARE,
}
"""timm's blocks, by module and class."""

_PATHS = re.compile(
    r"(blocks|blocks_token_only|(layers|stages|transformers)\.\d+\.blocks|levels\.\d+\.transformer_encoder)(\.\d+){1,2}"
)
"""Where timm lists blocks: one after the other, or a list for each stage."""

_EXPECTED = (
    "a timm ViT (vit, deit, deit3, beit, eva02, dinov2, dinov3, pit, samvit, naflexvit), Swin (v1, v2, v2_cr) "
    "or cait, convit, gcvit, hiera, mvitv2, nest, pvt_v2, sam2_hiera, twins"
)


class FoundBlock(NamedTuple):
    path: str  # in the model
    block: nn.Module
    kind: BlockKind


class UnknownModelError(ValueError):
    """The model is no timm Transformer whose blocks are known."""


def forward_class(block: nn.Module) -> type[nn.Module]:
    """The class of timm whose `forward` a block runs, with adapters or without."""
    return next(cls for cls in type(block).__mro__ if "forward" in vars(cls) and "carries_adapters" not in vars(cls))


def block_kind(block: nn.Module) -> BlockKind | None:
    """What is known of a block, by the class that its `forward` comes from; None: nothing."""
    cls = forward_class(block)
    module = cls.__module__.removeprefix("timm.models.")
    return KINDS.get(f"{module}.{cls.__qualname__}") if module != cls.__module__ else None


def block_width(block: nn.Module) -> int:
    """The number of channels of a known block's tokens, as they enter the FFN's branch."""
    widened: Any = getattr(block, "dim_out", None)  # before, in the first block of a stage
    if widened is not None:
        return int(widened)
    norm: Any = next(block.get_submodule(name) for name in ("norm1", "in_norm", "attns.0.norm") if _has(block, name))
    return int(norm.normalized_shape[-1] if norm.weight is None else norm.weight.shape[0])


def block_parameter(block: nn.Module) -> nn.Parameter:
    """The parameter whose device and dtype a block's adapters take; quantised weights are integers."""
    return next(parameter for parameter in block.parameters() if parameter.is_floating_point())


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def find_blocks(model: nn.Module) -> list[FoundBlock]:
    """All transformer blocks of a timm model, in the order of the forward pass, through all stages.

    Raises:
        UnknownModelError: the model has no blocks where timm's Transformers have them, one of them is of an unknown
            class or has an FFN that no adapter fits, or there are known blocks elsewhere, so that adapters would only
            go into a part of the model.
    """
    found: list[FoundBlock] = []
    for path, module in model.named_modules():
        kind = block_kind(module)
        if isinstance(module, nn.ModuleList) and _PATHS.fullmatch(f"{path}.0"):
            continue  # a list of blocks, as of a stage of Twins
        if _PATHS.fullmatch(path):
            if isinstance(module, ParallelAdapter):
                raise UnknownModelError(
                    f"model: expected timm's own blocks, but an adapter was merged around the block at {path} before; "
                    "take the model as it was before it was merged"
                )
            if kind is None:
                cls = forward_class(module)
                if cls is nn.Module:  # it has no forward, as a list of blocks
                    cls = type(module)
                raise UnknownModelError(
                    f"model: {type(model).__name__} has blocks of a class that is not known, {cls.__module__}."
                    f"{cls.__qualname__} at {path}; expected {_EXPECTED}"
                )
            if kind.bypass is not None and getattr(module, kind.bypass) is not None:
                raise UnknownModelError(
                    f"model: {type(model).__name__} has a block at {path} whose FFN changes the width of the tokens "
                    f"({kind.bypass}); an adapter beside it needs the same width before and after"
                )
            found.append(FoundBlock(path, module, kind))
        elif kind is not None:
            inner = _inner_model(model, path)
            if inner is not None:
                raise UnknownModelError(
                    f"model: expected the timm model, got a {type(model).__name__} around it; pass model.{inner}"
                )
            if any(isinstance(outer, FeatureDictNet) and module in outer.modules() for outer in model.modules()):
                raise UnknownModelError(
                    f"model: expected the timm model, got a {type(model).__name__} with its parts alone; "
                    "timm.create_model(..., features_only=True, feature_cls='getter') keeps it, in .model"
                )
            raise UnknownModelError(
                f"model: {type(model).__name__} has a transformer block at {path}, which is not where timm's ViTs "
                "and Swins have theirs; adapters would reach only a part of the model"
            )
    if not found:
        raise UnknownModelError(
            f"model: expected {_EXPECTED}, with its blocks in blocks, layers[i].blocks or stages[i].blocks; "
            f"found none in {type(model).__name__}"
        )
    return found


def _inner_model(model: nn.Module, path: str) -> str | None:
    """Where in a module the timm model is whose block is at a path, where ViTs and Swins have theirs; None: nowhere."""
    inner, _, name = path.partition(".")
    while not _PATHS.fullmatch(name) or not hasattr(model.get_submodule(inner), "get_classifier"):
        if not name:
            return None
        part, _, name = name.partition(".")
        inner = f"{inner}.{part}"
    return inner


def select_layers(layers: tuple[int, ...] | None, depth: int) -> list[int]:
    """Block indices in ascending order, negative ones counted from the end; None: all.

    Raises:
        ValueError: an index is out of range, or names a block twice.
    """
    if layers is None:
        return list(range(depth))
    chosen: set[int] = set()
    for index in layers:
        if not -depth <= index < depth:
            raise ValueError(f"layers: expected indices from {-depth} to {depth - 1} for {depth} blocks, got {index}")
        if index % depth in chosen:
            raise ValueError(f"layers: expected each block once, got block {index % depth} twice in {list(layers)}")
        chosen.add(index % depth)
    return sorted(chosen)
