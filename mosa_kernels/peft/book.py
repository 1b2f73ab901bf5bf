"""What a model with adapters knows about them: their names and configurations, and a head for each."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.peft.block import PROMPTS, SLOT, AdapterSlot, adapters_in
from mosa_kernels.peft.config import MoSAConfig
from mosa_kernels.peft.head import Head, head_paths
from mosa_kernels.peft.prompts import Prompts
from mosa_kernels.peft.tuned import Tuned

BOOK = "mosa"
"""The attribute of a model that holds its `AdapterBook`."""


class AdapterBook(nn.Module):
    """The model's adapters by name. The weights live in the blocks; the heads that are not in use live here.

    The backbone stays in evaluation mode while the model trains: its dropout, its stochastic depth and the running
    statistics of any BatchNorm stand still, for it is frozen, and the two passes of Eq. 6 have to differ by their
    experts alone. `model.train()` reaches this module last, after the blocks, and it sets them back.

    Attributes:
        configs: adapter name -> configuration, in the order of injection.
        active: the adapter that runs, or None within `disable_adapter`.
        trainable: the parameters that were trainable before the first adapter came.
        backbone_head: the classifier that the backbone came with, frozen; None while it is in use.
        heads: the classifiers of the adapters that are not active.
        tuned: the backbone's parameters that a baseline trains, or that were saved with an adapter, by the name of
            either; of the active one, the originals.
        folded: while an adapter is merged into the backbone's weights, these as they were, by name; else None.
        hooks: on the backbone, to be taken out with the last adapter.
    """

    backbone_head: Head | None

    def __init__(self, model: nn.Module, blocks: list[str], trainable: frozenset[str]) -> None:
        super().__init__()
        self.configs: dict[str, MoSAConfig] = {}
        self.active: str | None = None
        self._paths = blocks
        self.trainable = trainable
        self.backbone_head = None
        self.heads = nn.ModuleDict()
        self.tuned = nn.ModuleDict()
        self.folded: dict[str, Tensor] | None = None
        self.hooks: list[RemovableHandle] = []
        self._model = weakref.ref(model)  # weak, so that the model's memory is free as soon as its user drops it

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the model that these adapters are in is gone")
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model()}  # copies and pickles follow the model

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_model": weakref.ref(state["_model"])})

    def train(self, mode: bool = True) -> AdapterBook:
        super().train(mode)
        for module in self.frozen_modules():
            module.training = False
        return self

    def frozen_modules(self) -> Iterator[nn.Module]:
        """The backbone's modules but the model itself, its containers and its classifier."""
        model = self.model
        own = {id(module) for slot in self.slots() for module in slot.modules()}
        own |= {id(module) for module in self.modules()}
        own |= {id(module) for path in head_paths(model) for module in model.get_submodule(path).modules()}
        for path, module in model.named_modules():
            if path and id(module) not in own:
                yield module

    @property
    def blocks(self) -> list[str]:
        """The paths of the blocks that can carry adapters, in order."""
        return [path for path, _ in self._placed()]

    def slots(self) -> list[AdapterSlot]:
        """The slot of every block, in order."""
        return [slot for _, slot in self._placed()]

    def _placed(self) -> Iterator[tuple[str, AdapterSlot]]:
        """(path, slot) of the blocks; some may have left the model, as with timm's `prune_intermediate_layers`."""
        for path in self._paths:
            try:
                slot = self.model.get_submodule(f"{path}.{SLOT}")
            except AttributeError:
                continue
            assert isinstance(slot, AdapterSlot)
            yield path, slot

    def adapters(self, name: str) -> Iterator[tuple[str, str, FusedMoSAAdapter]]:
        """(path of the block, site, adapter) for all adapters of a name, in the order of the blocks."""
        for path, slot in self._placed():
            for site, adapter in adapters_in(slot, name):
                yield path, site, adapter

    def prompts(self, name: str) -> Iterator[tuple[str, str, Prompts]]:
        """(path of the block, site, prompts) of a name, in the order of the blocks; those with parameters."""
        for path, slot in self._placed():
            prompts = dict(slot.named(name).items()).get(PROMPTS) if name in slot else None
            if isinstance(prompts, Prompts) and prompts.weight is not None:
                yield path, PROMPTS, prompts

    def tuned_by(self, name: str | None) -> Tuned | None:
        """The parameters of the backbone that a baseline or an adapter has versions of its own of, or None."""
        found = self.tuned[name] if name is not None and name in self.tuned else None
        assert found is None or isinstance(found, Tuned)
        if found is not None:
            found.forget_gone(self.model)
        return found

    def originals(self) -> dict[str, Tensor]:
        """Those weights of the backbone that something else is in the place of just now, by name."""
        tuned = self.tuned_by(self.active)
        return {**(self.folded or {}), **({} if tuned is None else tuned.tensors())}


def check_unfolded(book: AdapterBook) -> None:
    """
    Raises:
        ValueError: an adapter is merged into the backbone's weights.
    """
    if book.folded is not None:
        raise ValueError(f"model: {book.active!r} is merged into the frozen weights; call unmerge_adapter first")


def check_settled(book: AdapterBook) -> None:
    """
    Raises:
        ValueError: an adapter is merged into the backbone's weights, or several run within `adapters_per_sample`.
    """
    check_unfolded(book)
    check_unrouted(book)


def check_unrouted(book: AdapterBook) -> None:
    """
    Raises:
        ValueError: several adapters run within `adapters_per_sample`.
    """
    if any(slot.routes is not None for slot in book.slots()):
        raise ValueError("model: expected to be outside of adapters_per_sample, which decides what runs")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers.

    Raises:
        TypeError: it is no module at all.
    """
    return _layers(model)[-1]


def is_kept_in_step(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is around it: it keeps in step only what trained when it was made."""
    return any(isinstance(layer, nn.parallel.DistributedDataParallel) for layer in _layers(model))


def _layers(model: nn.Module) -> list[nn.Module]:
    """The wrappers, from the outermost, and the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = [model]
    while True:
        inner = getattr(found[-1], "_orig_mod", None)
        if inner is None and isinstance(found[-1], (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = found[-1].module
        if inner is None:
            return found
        found.append(inner)


def find_book(model: nn.Module) -> AdapterBook | None:
    """The model's book, or None for a model without adapters."""
    book = getattr(unwrap(model), BOOK, None)
    return book if isinstance(book, AdapterBook) else None


def book_of(model: nn.Module) -> AdapterBook:
    """The model's book.

    Raises:
        ValueError: the model has no adapters.
    """
    book = find_book(model)
    if book is not None:
        return book
    kind, within = type(unwrap(model)).__name__, _within(model)
    if within:
        places = " or ".join(f"model.{path.removesuffix('._orig_mod')}" for path in within)
        raise ValueError(f"model: expected the one with adapters, got a {kind} around it; pass {places}")
    raise ValueError(f"model: expected one with adapters (see inject_adapter), got a plain {kind}")


def holder_of(model: nn.Module) -> nn.Module:
    """The timm model that has adapters: the model itself, or the only one within it that has some.

    Raises:
        ValueError: there is none, or there are several.
    """
    inner = unwrap(model)
    if find_book(inner) is None:
        within = _within(inner)
        if len(within) == 1:
            return inner.get_submodule(within[0])
    return book_of(inner).model


def _within(model: nn.Module) -> list[str]:
    books = (path for path, module in unwrap(model).named_modules() if isinstance(module, AdapterBook))
    return [path.removesuffix(f".{BOOK}") for path in books]


def check_known(book: AdapterBook, name: str) -> None:
    """
    Raises:
        ValueError: no adapter has this name.
    """
    if not isinstance(name, str) or name not in book.configs:
        raise ValueError(f"adapter_name: expected one of {', '.join(map(repr, book.configs))}, got {name!r}")
