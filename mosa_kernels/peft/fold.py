"""Low-rank updates in the frozen weights themselves: no cost at inference, and a way back that is exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosa_kernels.backends.element_types import PLAIN
from mosa_kernels.nn.adapter import MERGE_RULES, FusedMoSAAdapter
from mosa_kernels.nn.lora import FusedMoSALoRA
from mosa_kernels.peft.attention import find_attention, projected
from mosa_kernels.peft.book import AdapterBook, book_of, check_settled, unwrap
from mosa_kernels.shards import check_unsharded

MERGE_WHOLE = "save_adapter on every rank, then load_adapter and merge in a model that is not sharded"


@dataclass(frozen=True)
class FoldLoss:
    """What rounding to the weights' dtype lost of the updates that were added to them.

    Attributes:
        dtype: of the weights.
        relative: the norm of what was lost over the norm of the update, in the layer where it is largest; 1 is an
            update that has vanished.
        absolute: the largest change of an entry, in any layer.
        worst: the layer of `relative`.
    """

    dtype: torch.dtype
    relative: float
    absolute: float
    worst: str

    def __str__(self) -> str:
        return (
            f"merged into {self.dtype}: rounding loses {100 * self.relative:.3g} % of the update of {self.worst} and "
            f"moves an entry by at most {self.absolute:.2g}"
        )


def merge_adapter(model: nn.Module, rule: str | None = None, *, expert: int | None = None) -> FoldLoss:
    """Adds the active adapter to the frozen weights, in place; `unmerge_adapter` brings them back bit by bit.

    For style "lora" (MoSL, arXiv 2312.02923, section 4.3). The sums are in float32 (float64 for weights in it) and
    rounded once. The adapter stays in the model, at rest: while it is merged, nothing can be trained, switched or
    injected, and saving writes the adapter and the backbone's hash as ever. `merge_and_unload` is for good.

    Args:
        model: with adapters of style "lora".
        rule: "mean" or "jigsaw"; None: the `merge_rule` of the adapter's configuration.
        expert: only this one, as it runs by itself, in place of all by a rule.

    Returns:
        What rounding lost; it prints as a sentence. In half precision it is a warning too: small updates of large
        weights can vanish, and merging in float32 before converting loses less.

    Raises:
        TypeError: `expert` is no whole number.
        ValueError: the model has no adapters, the active one does not fold, is merged already, the weights are
            quantised, computed, shared by blocks or sharded by FSDP2, the rule is neither, or there is no such expert.
    """
    book = book_of(model)
    check_settled(book)
    check_rule(rule, expert)
    if book.active is None:
        raise ValueError("model: expected an active adapter, got one within disable_adapter")
    config = book.configs[book.active]
    if not config.sites or config.style != "lora":
        what = config.method if config.method != "adapter" else config.style
        raise ValueError(f"model: expected an active adapter of style 'lora', which folds into weights, got {what!r}")
    model = unwrap(model)
    check_unsharded(model, MERGE_WHOLE)
    updates = low_rank_updates(book, book.active, rule, expert)
    originals = {path: model.get_parameter(path).detach().clone() for path, _, _ in updates}
    loss = fold(model, updates)
    book.folded = originals
    for slot in book.slots():
        slot.folded = True
    return loss


@torch.no_grad()
def unmerge_adapter(model: nn.Module) -> nn.Module:
    """Puts back the very weights that `merge_adapter` changed; the adapter runs again.

    Returns:
        The model.

    Raises:
        ValueError: the model has no adapters, or none is merged.
    """
    book = book_of(model)
    if book.folded is None:
        raise ValueError("model: expected one whose adapter is merged (see merge_adapter), got one where none is")
    inner = unwrap(model)
    weights = dict(inner.named_parameters())
    for path, original in book.folded.items():
        if path in weights:  # its block may have left the model
            weights[path].copy_(original)
    book.folded = None
    for slot in book.slots():
        slot.folded = False
    return model


def check_rule(rule: str | None, expert: int | None = None) -> None:
    """
    Raises:
        ValueError: the merge rule is unknown, or comes with an expert, who has no use for it.
    """
    if rule is not None and rule not in MERGE_RULES:
        raise ValueError(f"rule: expected None or one of {', '.join(MERGE_RULES)}, got {rule!r}")
    if rule is not None and expert is not None:
        raise ValueError(f"rule, expert: expected one of them, got {rule!r} and {expert}")


def expert_of(book: AdapterBook, name: str, expert: int | None) -> Callable[[FusedMoSAAdapter], int | None]:
    """Which expert of an adapter merges alone: where others have several, an adapter of a single one merges whole, as
    it runs whatever the number (see `inference_experts`)."""
    several = any(adapter.sampler.chooses for _, _, adapter in book.adapters(name))
    return lambda adapter: expert if adapter.sampler.chooses or not several else None


Update = tuple[str, int, Tensor]
"""Name of a weight in the model, the first row that changes, and what is added to the rows from there on."""


def low_rank_updates(book: AdapterBook, name: str, rule: str | None, expert: int | None) -> list[Update]:
    """What the low-rank adapters of a name add to the model's weights.

    Raises:
        ValueError: a weight is quantised, computed from others, or in several blocks.
    """
    updates = []
    blocks = {book.model.get_submodule(path): path for path in book.blocks}
    alone = expert_of(book, name, expert)
    for path, site, adapter in book.adapters(name):
        if isinstance(adapter, FusedMoSALoRA):
            attention = find_attention(book.model.get_submodule(path))
            place = projected(attention, site)
            layer = attention.get_submodule(place.layer)
            _check_folds(f"{path}.attn.{place.layer}.weight", layer, place.columns)
            sharing = [at for block, at in blocks.items() if any(each is layer.weight for each in block.parameters())]
            if len(sharing) > 1:
                raise ValueError(
                    f"model: expected {path}.attn.{place.layer}.weight in one block alone, for an update to fold into, "
                    f"got one that {' and '.join(sharing)} share; give each a copy of its own before"
                )
            updates.append((f"{path}.attn.{place.layer}.weight", place.start, adapter.delta(rule, alone(adapter))))
    return updates


def _check_folds(path: str, layer: Any, columns: int) -> None:
    """Quantised weights are codes, which of 4 bits are packed, and which of 8 would take an update as a number."""
    weight = layer.weight
    if not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"model: expected {path} to be a parameter, for an update to fold into, got one that a "
            f"{type(layer).__name__} computes; take off before what does that (a parametrisation, a weight norm)"
        )
    kind = weight.dtype if type(weight) in PLAIN else type(weight).__name__
    coded = type(weight) not in PLAIN or not weight.is_floating_point() or weight.element_size() < 2
    if coded or list(weight.shape[1:]) != [columns]:
        raise ValueError(
            f"model: expected {path} in floating point, for an update to fold into, got {kind} "
            f"{list(weight.shape)} of a {type(layer).__name__}; load the adapter into the model as it was before it "
            "was quantised (load_adapter with ignore_backbone_hash=True) and merge there"
        )


def fold(model: nn.Module, updates: Iterable[Update]) -> FoldLoss:
    """Adds updates to weights, each row rounded once; a warning says what that lost in half precision."""
    losses = []
    for path, start, delta in updates:
        rows = model.get_parameter(path).detach()[start : start + delta.shape[0]]
        exact = rows.to(torch.promote_types(rows.dtype, delta.dtype)) + delta
        rows.copy_(exact)
        lost = exact - rows.to(exact.dtype)
        size = delta.norm().item()
        relative = lost.norm().item() / size if size else 0.0
        losses.append(FoldLoss(rows.dtype, relative, lost.abs().max().item(), path))
    worst = max(losses, key=lambda loss: loss.relative)
    found = FoldLoss(worst.dtype, worst.relative, max(loss.absolute for loss in losses), worst.worst)
    if found.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"{found}; merge in float32 and convert afterwards to compare", stacklevel=3)
    return found
