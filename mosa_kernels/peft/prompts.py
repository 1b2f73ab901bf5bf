"""Visual prompt tuning: learnable tokens after the class token (VPT, arXiv 2203.12119).

VPT-deep gives every block prompts of its own and forgets what the block made of them; VPT-shallow gives them to the
first block and carries them through (section 3.2). Either way they are cut out before anything but a block sees them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.peft.attention import find_attention
from mosa_kernels.peft.placement import FoundBlock, block_parameter, block_width, forward_class
from mosa_kernels.peft.view import has_own_forward

_WITHOUT_POSITIONS = frozenset(
    f"timm.{name}"
    for name in (
        "layers.attention.Attention",
        "layers.attention.AttentionRope",
        "layers.diff_attention.DiffAttention",
        "models.eva.EvaAttention",
        "models.vision_transformer.Attention",
    )
)
"""Attention that takes further tokens: without a bias by position, or with rotations that spare the first ones."""
_WITH_POSITIONS = frozenset(
    f"timm.models.{name}" for name in ("beit", "vision_transformer_relpos", "vision_transformer_sam")
)
"""Where attention may have a bias by position."""


class Prompts(nn.Module):
    """The prompts of one block.

    Args:
        length: how many.
        width: d.
        position: after this many tokens of the model's own.
        inserts: whether they come in here; None of its parameters exist otherwise.
        removes: whether they are cut out of the block's output.
        bound: of the uniform distribution that they are drawn from.
        dropout: on the prompts, in training.

    Attributes:
        weight: [length, d], or None.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        length: int,
        width: int,
        position: int,
        inserts: bool,
        removes: bool,
        bound: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.position, self.removes, self.dropout = length, position, removes, dropout
        if not inserts:
            self.register_parameter("weight", None)
            return
        drawn = (2 * torch.rand(length, width, generator=generator) - 1) * bound
        self.weight = nn.Parameter(drawn.to(device=device, dtype=dtype))

    def put_in(self, x: Tensor) -> Tensor:
        """Tokens [B, n, d] to [B, n + length, d], where the prompts come in at this block."""
        if self.weight is None:
            return x
        prompts = F.dropout(self.weight, self.dropout, self.training).to(x.dtype)
        prompts = prompts.expand(x.shape[0], -1, -1)
        return torch.cat((x[:, : self.position], prompts, x[:, self.position :]), 1)

    def take_out(self, x: Tensor) -> Tensor:
        """Tokens [B, n + length, d] to [B, n, d], where they go out at this block."""
        if not self.removes:
            return x
        return torch.cat((x[:, : self.position], x[:, self.position + self.length :]), 1)

    def extra_repr(self) -> str:
        return f"length={self.length}, position={self.position}, inserts={self.weight is not None}"


def check_prompts(model: nn.Module, blocks: list[FoundBlock], method: str) -> None:
    """
    Raises:
        ValueError: the model has no place for further tokens; the message says why.
    """
    name = type(model).__name__

    def refuse(reason: str) -> ValueError:
        return ValueError(f"method: {method!r} adds tokens, which {name} does not take: {reason}")

    for path, block, _ in blocks:
        try:
            attention = find_attention(block)
        except ValueError as error:
            raise refuse(f"at {path}, {error}") from error
        if hasattr(attention, "num_prefix_tokens") and has_own_forward(attention):  # `AdaptedBlock` runs a view of it
            raise refuse(f"the forward of attention at {path} was replaced, and would not run")
        cls, window = forward_class(attention), getattr(attention, "window_size", None)
        if f"{cls.__module__}.{cls.__qualname__}" in _WITHOUT_POSITIONS:
            continue
        if window is not None and "swin" in cls.__module__:
            raise refuse(f"attention works within windows of fixed size at {path}")
        if cls.__module__ == "timm.models.beit" and window is None:
            continue
        if cls.__module__ in _WITH_POSITIONS:
            raise refuse(f"attention at {path} has a bias for every pair of positions, and none for prompts")
        raise refuse(f"{cls.__module__}.{cls.__qualname__} at {path} is not known to take more of them")
    if not isinstance(getattr(model, "num_prefix_tokens", None), int) or _patch_area(model) is None:
        raise refuse("expected num_prefix_tokens and patch_embed.patch_size, as timm's ViTs have them")


def make_prompts(
    model: nn.Module,
    blocks: list[FoundBlock],
    layers: list[int],
    length: int,
    deep: bool,
    dropouts: list[float],
    seed: int,
) -> dict[int, Prompts]:
    """Prompts by block index; Xavier-uniform over the values of a patch and the width, as VPT's authors draw them.

    Args:
        layers: the blocks that get prompts of their own, ascending; shallow ones get them before the first of these
            and keep them to the last.
        dropouts: on each block's own prompts; on shallow ones, the first.
    """
    area = _patch_area(model)
    assert area is not None
    inside = layers if deep else list(range(layers[0], layers[-1] + 1))
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for number, index in enumerate(inside):
        block = blocks[index].block
        width, reference = block_width(block), block_parameter(block)
        made[index] = Prompts(
            length,
            width,
            int(model.num_prefix_tokens),  # type: ignore[arg-type]
            deep or index == layers[0],
            deep or index == layers[-1],
            math.sqrt(6 / (3 * area + width)),
            dropouts[number if deep else 0],
            generator,
            reference.device,
            reference.dtype,
        )
    return made


def _patch_area(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(size, int):
        return size * size
    return math.prod(size) if isinstance(size, (tuple, list)) else None
