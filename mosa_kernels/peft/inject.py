"""Putting adapters into timm models, in place, and taking them out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mosa_kernels.backends.element_types import PLAIN
from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.lora import FusedMoSALoRA
from mosa_kernels.nn.streams import derived_seed
from mosa_kernels.peft.attention import find_attention, projected
from mosa_kernels.peft.backbone import backbone_tensors
from mosa_kernels.peft.block import PROMPTS, AdapterSlot, give_slot, take_slot
from mosa_kernels.peft.book import (
    BOOK,
    AdapterBook,
    book_of,
    check_known,
    check_settled,
    find_book,
    is_kept_in_step,
    unwrap,
)
from mosa_kernels.peft.checkpointing import let_gradients_in
from mosa_kernels.peft.config import MoSAConfig
from mosa_kernels.peft.head import copy_head, current_head, fresh_head, install_head
from mosa_kernels.peft.placement import (
    FoundBlock,
    UnknownModelError,
    block_parameter,
    block_width,
    find_blocks,
    forward_class,
    select_layers,
)
from mosa_kernels.peft.prompts import check_prompts, make_prompts
from mosa_kernels.peft.styles import LORA_TARGETS, STYLES, Site
from mosa_kernels.peft.switch import set_adapter
from mosa_kernels.peft.tuned import Tuned, is_bias
from mosa_kernels.peft.view import has_own_forward
from mosa_kernels.shards import check_unsharded


def inject_adapter(
    model: nn.Module, config: MoSAConfig, adapter_name: str = "default", *, num_classes: int | None = None
) -> nn.Module:
    """Puts adapters into the blocks of a timm Transformer, in place, and makes them the ones that run and train.

    The backbone is frozen, and stays in evaluation mode when the model trains: no dropout, no stochastic depth, no
    running statistics. The head trains. The output does not change: a fresh adapter adds zeros. (In the few models
    whose tokens lie transposed in memory and are pooled without a norm, such as vit_relpos, the pooling sums in
    another order.) Several adapters, each with its own head, share one backbone: the first takes the model's head,
    the others start from a copy of the head that the model came with.

    The baselines (`MoSAConfig.method`) are put in, switched and saved in the same way. Those that train parameters of
    the backbone train copies of them, so that the backbone is there for the others. Prompts change the output, as
    they do in VPT.

    Args:
        model: of `timm.create_model`; its blocks keep the names of their modules and parameters.
        config: what to put in.
        adapter_name: letters, digits, "-" and "_".
        num_classes: gives this adapter a fresh head for that many classes.

    Returns:
        The model.

    Raises:
        TypeError: `config` is no MoSAConfig, or the model no timm model.
        UnknownModelError: the model is no Transformer whose blocks are all known; it is left as it was.
        ValueError: the name is taken or unfit, a layer is out of range, the style does not fit the blocks, or the model
            is in a DistributedDataParallel or sharded already.
    """
    if not isinstance(config, MoSAConfig):
        raise TypeError(f"config: expected a MoSAConfig, got {type(config).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a timm model, got {type(model).__name__}")
    if is_kept_in_step(model):
        raise ValueError(
            "model: expected one that is not wrapped yet, got a DistributedDataParallel, which keeps in step only what "
            "trained when it was made; inject first and wrap then"
        )
    model = unwrap(model)
    check_unsharded(model, "inject before it is sharded")
    book = find_book(model)
    _check_name(adapter_name, book)
    if book is not None:
        check_settled(book)
    blocks = find_blocks(model)
    if book is None:
        _check_forwards(blocks)
    else:
        _check_blocks(book, blocks)
    layers = select_layers(config.layers, len(blocks))
    _check_style(config, [blocks[index] for index in layers])
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0
    ):
        raise ValueError(f"num_classes: expected None or a number from 0, got {num_classes!r}")
    own_head = current_head(model)

    with torch.inference_mode(False):  # tensors made in it never train
        made = _make(model, config, blocks, layers)
        tuned = _make_tuned(model, config.method)
        if book is None:
            book = _open_book(model, blocks)
            head = own_head
            book.backbone_head = copy_head(head).requires_grad_(False)
        else:
            head = copy_head(own_head if book.backbone_head is None else book.backbone_head)
        if num_classes is not None:
            head = fresh_head(model, num_classes)
        for index, adapters in made.items():
            slot = book.slots()[index]
            slot[adapter_name] = adapters
        if tuned is not None:
            book.tuned[adapter_name] = tuned
        book.configs[adapter_name] = config
        book.heads[adapter_name] = head
    return set_adapter(model, adapter_name).train(model.training)


def delete_adapter(model: nn.Module, adapter_name: str) -> nn.Module:
    """Removes the adapters and the head of a name, in place; of the active one, the first other becomes active.

    With the last one gone the model is what it was before: its own head, its own trainable parameters, plain blocks.

    Raises:
        ValueError: the model has no adapter of this name, one is merged into the frozen weights, or FSDP2 has sharded
            the model.
    """
    book = book_of(model)
    check_known(book, adapter_name)
    check_settled(book)
    model = unwrap(model)
    check_unsharded(model, "delete before it is sharded")
    others = [name for name in book.configs if name != adapter_name]
    if not others:
        return remove_all(model)
    if book.active == adapter_name:
        set_adapter(model, others[0])
    for slot in book.slots():
        if adapter_name in slot:
            del slot[adapter_name]
    del book.configs[adapter_name]
    del book.heads[adapter_name]
    if adapter_name in book.tuned:
        del book.tuned[adapter_name]
    return model


def remove_all(model: nn.Module, keep_head: bool = False) -> nn.Module:
    """Takes out every adapter, in place; with `keep_head` the active head, and what it was trained with, stays."""
    book = book_of(model)
    model = unwrap(model)
    if not keep_head and book.active is not None:
        assert book.backbone_head is not None
        install_head(model, book.backbone_head)
        tuned = book.tuned_by(book.active)
        if tuned is not None:
            tuned.exchange(model)
    for path in book.blocks:
        take_slot(model.get_submodule(path))
    for hook in book.hooks:
        hook.remove()
    delattr(model, BOOK)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in book.trainable)
    return model.train(model.training)


def _check_name(name: str, book: AdapterBook | None) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(AdapterSlot(0), name):
        raise ValueError(
            f"adapter_name: expected letters, digits, '-' and '_', and no word that nn.Module uses, got {name!r}"
        )
    if book is not None and name in book.configs:
        raise ValueError(f"adapter_name: expected a new name, got {name!r}, which the model already has")


def _check_blocks(book: AdapterBook, blocks: list[FoundBlock]) -> None:
    known = set(book.blocks)
    new = [path for path, _, _ in blocks if path not in known]
    if new:
        raise ValueError(
            f"model: expected the blocks that it had when its first adapter came, got a new one at {new[0]}; "
            "take the adapters out first (delete_adapter, merge_and_unload)"
        )


def _check_forwards(blocks: list[FoundBlock]) -> None:
    for path, block, _ in blocks:
        if has_own_forward(block):
            raise UnknownModelError(
                f"model: expected timm's own blocks, got one at {path} whose forward was replaced, so that "
                "its adapters would never run; inject first and replace it then"
            )


def _check_style(config: MoSAConfig, blocks: list[FoundBlock]) -> None:
    for found in blocks:
        for site in config.sites:
            reason = _unreachable(found, site)
            if reason is not None:
                fit = [name for name, style in STYLES.items() if name != config.style and _fits(style.sites, blocks)]
                raise ValueError(
                    f"style: {config.style!r} does not reach {site!r} of {forward_class(found.block).__name__} at "
                    f"{found.path}: {reason}; expected {' or '.join(map(repr, fit))}"
                )


def _fits(sites: Iterable[Site], blocks: list[FoundBlock]) -> bool:
    return all(_unreachable(found, site) is None for found in blocks for site in sites)


def _unreachable(found: FoundBlock, site: Site) -> str | None:
    """Why no adapter can sit at a site of a block; None: it can."""
    if site in LORA_TARGETS:
        try:
            attention = find_attention(found.block)
            projected(attention, site)
        except ValueError as error:
            return str(error)
        if has_own_forward(attention):
            return "its attention's forward was replaced, and would not run"
    if site == "after_ffn" and found.kind.ffn is None:
        return "its FFN is no module of its own"
    if site == "after_attention" and found.kind.attention is None:
        return "its attention is no module of its own with one output a token"
    return None


def _make(
    model: nn.Module, config: MoSAConfig, blocks: list[FoundBlock], layers: list[int]
) -> dict[int, nn.ModuleDict]:
    """What goes into the blocks, by their index."""
    if config.method in ("vpt-shallow", "vpt-deep"):
        chosen = [blocks[index] for index in layers]
        check_prompts(model, chosen, config.method)
        deep = config.method == "vpt-deep"
        if not deep:
            _check_shallow(blocks, layers)
        dropouts = config.dropout_of(len(layers) if deep else 1)
        prompts = make_prompts(model, blocks, layers, config.prompt_length, deep, dropouts, config.seed)
        return {index: nn.ModuleDict({PROMPTS: each}) for index, each in prompts.items()}
    if config.method != "adapter":
        return {}
    of_each = zip(layers, config.experts_of(len(layers)), config.dropout_of(len(layers)), strict=True)
    return {index: _make_adapters(config, blocks[index], index, count, rate) for index, count, rate in of_each}


def _make_adapters(
    config: MoSAConfig, found: FoundBlock, index: int, num_experts: int, dropout: float
) -> nn.ModuleDict:
    """One adapter for each site of a block, where the block is and in its dtype."""
    full = config.resolved()
    assert full.activation is not None
    assert full.scale is not None
    assert full.norm is not None
    reference = block_parameter(found.block)
    adapters = nn.ModuleDict()
    for site in config.sites:
        # Of LoRA's sites the number is the target's, whichever others there are; of the others, that in the style.
        number = LORA_TARGETS.index(site) if site in LORA_TARGETS else config.sites.index(site)
        common: dict[str, Any] = {
            "bottleneck": full.bottleneck,
            "num_experts": num_experts,
            "scale": full.scale,
            "dropout": dropout,
            "sparse": "up" if full.sparse == "none" else full.sparse,
            "granularity": full.granularity,
            "seed": derived_seed(full.seed, index, number),
            "merge_rule": full.merge_rule,
            "expert_per": full.expert_per,
            "expert_scale": full.expert_scale,
            "learnable_scale": full.learnable_scale,
            "pruned": full.mode == "pruned",
            "device": reference.device,
            "dtype": reference.dtype,
        }
        adapter: FusedMoSAAdapter
        if site in LORA_TARGETS:
            place = projected(find_attention(found.block), site)
            adapter = FusedMoSALoRA(place.columns, place.rows, **common)
        else:
            adapter = FusedMoSAAdapter(
                block_width(found.block),
                activation=full.activation,
                norm=full.norm,
                expert_bias=full.expert_bias,
                **common,
            )
        adapter.sampler.anchored = full.anchored
        adapters[site] = adapter
    return adapters


def _check_shallow(blocks: list[FoundBlock], layers: list[int]) -> None:
    inside = blocks[layers[0] : layers[-1] + 1]
    widths = {block_width(block) for _, block, _ in inside}
    if len(widths) > 1 or len({path.rpartition(".")[0] for path, _, _ in inside}) > 1:
        raise ValueError(
            "method: 'vpt-shallow' carries its prompts through all blocks, which stages of different widths "
            f"{sorted(widths)} do not let it; expected 'vpt-deep'"
        )


def _make_tuned(model: nn.Module, method: str) -> Tuned | None:
    """What a baseline trains of the backbone, as copies."""
    if method not in ("full", "bitfit"):
        return None
    known = backbone_tensors(model)
    paths = [name for name, _ in model.named_parameters() if name in known and (method == "full" or is_bias(name))]
    for name in paths:
        plain = type(known[name]) in PLAIN
        if not (plain and known[name].is_floating_point()):
            kind = known[name].dtype if plain else type(known[name]).__name__
            raise ValueError(f"method: {method!r} trains {name}, which is quantised to {kind}; expected floating point")
    return Tuned({name: known[name] for name in paths})


def _open_book(model: nn.Module, blocks: list[FoundBlock]) -> AdapterBook:
    if hasattr(model, BOOK):
        raise ValueError(f"model: it has an attribute {BOOK!r} already, which mosa_kernels needs for its own")
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    for index, (_, block, kind) in enumerate(blocks):
        give_slot(block, kind, index)
    book = AdapterBook(model, [path for path, _, _ in blocks], trainable)
    model.add_module(BOOK, book)
    book.hooks = let_gradients_in(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    return book
