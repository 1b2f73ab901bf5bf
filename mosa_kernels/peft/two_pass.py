"""The two forward passes of Eq. 6 (arXiv 2312.02923), as one doubled batch or one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mosa_kernels.nn.sampler import Draw, ExpertSampler
from mosa_kernels.nn.streams import STREAM_BITS, marked_generator
from mosa_kernels.peft.block import AdapterSlot
from mosa_kernels.peft.book import AdapterBook, book_of, check_settled, holder_of
from mosa_kernels.peft.checkpointing import refuse_reentrant
from mosa_kernels.peft.images import Images, doubled, patches_of
from mosa_kernels.peft.placement import select_layers

MODES = ("batched", "sequential")


@dataclass(frozen=True)
class TwoPassOutput:
    """What both passes gave.

    Attributes:
        logits1, logits2: [B, classes].
        features1, features2: the tokens that each collected block hands on, adapter included: [B, tokens, d], of a Swin
            [B, H, W, d]; in the order of `blocks`.
        blocks: the indices of the collected blocks, ascending.
        depth: how many blocks the model has.
    """

    logits1: Tensor
    logits2: Tensor
    features1: list[Tensor]
    features2: list[Tensor]
    blocks: tuple[int, ...]
    depth: int


def two_pass(
    model: nn.Module, images: Images, mode: str = "batched", features: bool | Iterable[int] = True
) -> TwoPassOutput:
    """Runs the images through the model twice, with experts and dropout drawn anew for each pass.

    Both modes draw the same experts and the same dropout, so they differ by the rounding of matrix products alone;
    "sequential" needs half the memory of activations at a time, if each pass is differentiated on its own. An anchored
    adapter runs merged in the first pass. The draws come from PyTorch's default CPU generator, which advances by one
    number. Activation checkpointing recomputes with the same draws, whatever ran in between. The model may be compiled
    or wrapped for data-parallel training.

    Args:
        model: with adapters, in training mode: in evaluation mode both passes would be the same. Or a model around it,
            such as a backbone with a head of your own.
        images: [B, channels, height, width]; or, of timm's NaFlex models, a mapping with "patches" [B, N, ...], whose
            other tensors have B rows too.
        mode: "batched", one pass over the doubled batch, or "sequential".
        features: True collects the outputs of all blocks, False of none; or the indices of blocks (negative from
            the end).

    Raises:
        TypeError: the model's output is no tensor, `images` is neither one nor a mapping with patches, or `features`
            lists nothing.
        ValueError: an argument is out of range, or the model has no active adapters.
        RuntimeError: the model is in evaluation mode, or its activation checkpointing is reentrant.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    patches_of(images)
    book = book_of(holder_of(model))
    check_settled(book)
    if book.active is None:
        raise ValueError("model: expected an active adapter, got one within disable_adapter")
    if not (model.training and book.model.training):
        raise RuntimeError(
            "two_pass: expected the model in training mode, got evaluation mode, in which both passes agree"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError("model: expected no DataParallel, whose replicas share no draws; use DistributedDataParallel")
    refuse_reentrant(model)
    slots = book.slots()
    blocks = _chosen(features, len(slots))
    samplers = [adapter.sampler for _, _, adapter in book.adapters(book.active)]
    for index, sampler in enumerate(samplers):
        sampler.index = index
    for index, slot in enumerate(slots):
        slot.index = index
    stream = int(torch.randint(2**STREAM_BITS, (), device="cpu"))
    run = _Run(model, book, slots, blocks, stream)
    if mode == "sequential":
        logits1, features1 = run(images, (0,))
        logits2, features2 = run(images, (1,))
    else:
        logits, both = run(doubled(images), (0, 1))
        # Not sliced: the gradient of a slice is filled with zeros and added, twice a feature.
        logits1, logits2 = logits.chunk(2)
        pairs = [feature.chunk(2) for feature in both]
        features1, features2 = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return TwoPassOutput(logits1, logits2, features1, features2, tuple(blocks), len(slots))


def _chosen(features: bool | Iterable[int], depth: int) -> list[int]:
    if isinstance(features, bool):
        return list(range(depth)) if features else []
    if not isinstance(features, Iterable):
        raise TypeError(f"features: expected True, False or block indices, got {features!r}")
    chosen = tuple(features)
    for index in chosen:
        if isinstance(index, bool) or not isinstance(index, int) or not -depth <= index < depth:
            raise ValueError(f"features: expected True, False or block indices below {depth}, got {index!r}")
    return select_layers(tuple(sorted({index % depth for index in chosen})), depth) if chosen else []


@dataclass(frozen=True)
class _Run:
    """Forward passes whose draws come from one stream."""

    model: nn.Module
    book: AdapterBook
    slots: list[AdapterSlot]
    blocks: list[int]
    stream: int

    def __call__(self, images: Images, passes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the outputs of the chosen blocks."""
        with (
            self._planned(patches_of(images), passes),
            _recorded([self.slots[index] for index in self.blocks]) as record,
            _side_effects_under_checkpoint() if self.blocks else nullcontext(),
        ):
            logits = self.model(images)
        if not isinstance(logits, Tensor):
            raise TypeError(f"model: expected logits [B, classes] as its output, got {type(logits).__name__}")
        missing = [index for index in self.blocks if index not in record]
        if missing:
            raise RuntimeError(f"features: expected the outputs of blocks {missing}, which did not run")
        first = next((slot.index for slot in self.slots if slot.current() is not None), len(self.slots))
        if logits.requires_grad and not all(record[i].requires_grad for i in self.blocks if i >= first):
            raise RuntimeError(
                "features: reentrant activation checkpointing cuts them off from the gradient; use the other kind "
                "(timm.layers.set_reentrant_ckpt(False), use_reentrant=False)"
            )
        return logits, [record[index] for index in self.blocks]

    @contextmanager
    def _planned(self, images: Tensor, passes: tuple[int, ...]) -> Iterator[None]:
        """Every adapter has its draws, and the default generator says where they came from."""
        assert self.book.active is not None
        adapters = [adapter for _, _, adapter in self.book.adapters(self.book.active)]
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            # a replayed graph has to draw anew: only the device's own generator does that
            plans = [_drawn_in_graph(adapter.sampler, images, passes, adapter.dropout > 0) for adapter in adapters]
            mark: Any = nullcontext()
        else:
            plans = [
                adapter.sampler.draw_passes(self.stream, passes, images.shape[0], images.device, adapter.dropout > 0)
                for adapter in adapters
            ]
            mark = marked_generator(self.stream, passes, images.device)
        try:
            for adapter, plan in zip(adapters, plans, strict=True):
                adapter.sampler.plan = plan
            with mark:
                yield
        finally:
            for adapter in adapters:
                adapter.sampler.plan = None


def _drawn_in_graph(sampler: ExpertSampler, images: Tensor, passes: tuple[int, ...], dropout: bool) -> Draw:
    """Draws for a CUDA graph under capture, from the device's default generator."""
    draws = []
    for number in passes:
        draw = sampler.draw(images.shape[0] // len(passes), images.device, dropout)
        if sampler.anchored and number == 0 and isinstance(draw.expert, Tensor):
            draw = Draw(torch.full_like(draw.expert, -1), draw.seed)
        draws.append(draw)
    experts = [draw.expert.reshape(-1) for draw in draws if isinstance(draw.expert, Tensor)]
    seeds = [draw.seed.reshape(1) for draw in draws if draw.seed is not None]
    return Draw(torch.cat(experts) if experts else draws[0].expert, torch.cat(seeds) if seeds else None)


@contextmanager
def _recorded(slots: list[AdapterSlot]) -> Iterator[dict[int, Tensor]]:
    record: dict[int, Tensor] = {}
    try:
        for slot in slots:
            slot.record = record
        yield record
    finally:
        for slot in slots:
            slot.record = None


def _side_effects_under_checkpoint() -> Any:
    """Lets a compiled model record features within checkpointed blocks: the forward pass alone is to do that."""
    dynamo = sys.modules.get("torch._dynamo")  # it takes seconds to import, and without it nothing is compiled
    if dynamo is None or not hasattr(dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        return nullcontext()
    return dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
