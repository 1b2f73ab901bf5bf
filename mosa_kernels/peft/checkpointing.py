"""Reentrant activation checkpointing, which drops the gradients of whatever it is handed no gradient for.

It differentiates a block only if the block's input takes a gradient. That of a frozen backbone takes none, so the
adapters before the last checkpointed block would not train, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import use_reentrant_ckpt
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mosa_kernels.peft.plain import tokens_of


def let_gradients_in(model: nn.Module) -> list[RemovableHandle]:
    """From now on the first block's input takes a gradient where timm checkpoints with reentry; elsewhere it does not,
    which spares the frozen layers before the first adapter. (NaFlexViT, without a `patch_embed`, hands its blocks
    arguments by name, which that kind of checkpointing refuses.)"""
    stems = [getattr(model, name, None) for name in ("patch_embed", "stem")]
    return [stem.register_forward_hook(_take_gradients) for stem in stems if isinstance(stem, nn.Module)]


def refuse_reentrant(model: nn.Module) -> None:
    """
    Raises:
        RuntimeError: timm is to checkpoint this model's blocks with reentry, and gradients are asked for.
    """
    if not (torch.is_grad_enabled() and use_reentrant_ckpt()):
        return
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise RuntimeError(
            "two_pass: expected activation checkpointing without reentry, got the reentrant kind, which cuts the "
            "blocks' outputs off from the gradient; call timm.layers.set_reentrant_ckpt(False)"
        )


def _take_gradients(_: nn.Module, __: Any, output: Any) -> None:
    tokens = tokens_of(output)
    if torch.is_grad_enabled() and use_reentrant_ckpt() and isinstance(tokens, Tensor):
        tokens.requires_grad_()
