"""A transformer block with adapters: timm's own forward, run with another FFN branch.

The block keeps its modules, parameters and their names. Its class becomes a subclass whose forward hands timm's forward
a view of the block, in which the one module where the residual stream enters the FFN's branch remembers the stream,
and attention computes its projections with low-rank updates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.sampler import Alternatives
from mosa_kernels.peft.attention import updated_attention
from mosa_kernels.peft.placement import BlockKind, block_kind, forward_class
from mosa_kernels.peft.plain import on_tokens, tokens_of
from mosa_kernels.peft.prompts import Prompts
from mosa_kernels.peft.route import Routes, routed_sites
from mosa_kernels.peft.styles import LORA_TARGETS
from mosa_kernels.peft.view import ModuleView

SLOT = "mosa"
"""The attribute of a block that holds its adapters; they are saved as ``<block>.mosa.<adapter name>.<site>``."""
PROMPTS = "prompts"
"""The site of `Prompts`."""
Sites: TypeAlias = "nn.ModuleDict | dict[str, Callable[..., Tensor]]"
"""What runs in a block, by site."""


class AdapterSlot(Alternatives):
    """The adapters of one block: adapter name -> site -> adapter.

    Attributes:
        index: of the block, through all stages.
        active: the name of the adapter that runs, or None.
        record: where the block's outputs go, by its index, while `two_pass` collects them; else None.
        routes: which images meet which adapters, within `adapters_per_sample`; else None.
        folded: whether the adapters that run are in the block's own weights already.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.active: str | None = None
        self.record: dict[int, Tensor] | None = None
        self.routes: Routes | None = None
        self.folded = False

    def running(self) -> tuple[str, ...]:
        if self.folded:
            return ()
        if self.routes is not None:
            return tuple(name for name in self.routes.groups if name in self)
        return () if self.active is None or self.active not in self else (self.active,)

    def current(self) -> Sites | None:
        """What runs, by site; None where the block computes as the backbone does.

        Raises:
            RuntimeError: in training mode while the adapters are in the block's own weights.
        """
        if self.folded and self.training:
            raise RuntimeError("model: its adapter is merged into the frozen weights; train after unmerge_adapter")
        found = {name: self.named(name) for name in self.running()}
        if self.routes is not None and found:
            return routed_sites(self.routes, found)
        return next(iter(found.values()), None)

    def named(self, name: str) -> nn.ModuleDict:
        """The adapters of one name, by site."""
        adapters = self[name]
        assert isinstance(adapters, nn.ModuleDict)
        return adapters


class Tap:
    """Calls a module and remembers its input."""

    def __init__(self, module: Callable[..., Tensor]) -> None:
        self.module = module
        self.stream: Tensor | None = None

    def __call__(self, stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.stream = stream
        return self.module(stream, *args, **kwargs)

    def add(self, adapter: Callable[..., Tensor], out: Any) -> Any:
        """``out + adapter(stream)``."""
        stream = self.stream
        if stream is None:
            raise RuntimeError("the block did not pass its residual stream where it is known to")
        return on_tokens(lambda total: adapter(stream.reshape(total.shape), residual=total, add_input=False), out)


class After:
    """Calls what stands in a block, and gives ``y + adapter(y)`` of its output y."""

    def __init__(self, module: Callable[..., Any], adapter: Callable[..., Tensor]) -> None:
        self._module = module
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)  # Hiera's blocks ask their attention for its stride

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return on_tokens(self._adapter, self._module(*args, **kwargs))


class AdaptedBlock(nn.Module):
    """What a block's class becomes: ``class AdaptedX(AdaptedBlock, X)``, made by `adapted_class`."""

    carries_adapters = True
    base: type[nn.Module]
    kind: BlockKind
    mosa: AdapterSlot

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        adapters = self.mosa.current()
        if adapters is None:
            out = self.base.forward(self, x, *args, **kwargs)
        else:
            out = self._forward_with(adapters, x, *args, **kwargs)
        if self.mosa.record is not None:
            self.mosa.record[self.mosa.index] = tokens_of(out)
        return out

    def _forward_with(self, adapters: Sites, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = self.kind
        if self.mosa.routes is not None and x.shape[0] != self.mosa.routes.images:
            raise ValueError(
                f"adapters_per_sample: expected as many images as names, {self.mosa.routes.images}, got {x.shape[0]}"
            )
        view: Any = ModuleView(self)
        if PROMPTS in adapters:
            return self._forward_prompted(view, cast(Prompts, adapters[PROMPTS]), x, *args, **kwargs)
        updates: dict[str, Any] = {site: adapters[site] for site in LORA_TARGETS if site in adapters}
        if updates:
            view.attn = updated_attention(self.attn, updates, x.shape[0])
            if kind.attention not in (None, "attn"):  # a method of the block, which calls attention
                setattr(view, kind.attention, partial(getattr(self.base, kind.attention), view))
        if "after_attention" in adapters:
            assert kind.attention is not None
            setattr(view, kind.attention, After(getattr(view, kind.attention), adapters["after_attention"]))
        if "after_ffn" in adapters:
            view.mlp = After(self.mlp, adapters["after_ffn"])  # type: ignore[arg-type]
        if "parallel_ffn" not in adapters:
            return self.base.forward(view, x, *args, **kwargs)

        adapter = adapters["parallel_ffn"]
        entry = kind.branch[0]
        if entry == "":
            return adapter(x, residual=self.base.forward(view, x, *args, **kwargs), add_input=False)
        if entry.endswith("[]"):
            branches = getattr(view, entry[:-2])
            tap = Tap(branches[0])
            setattr(view, entry[:-2], [tap, *branches[1:]])
        else:
            tap = Tap(getattr(view, entry))
            setattr(view, entry, tap)
        if kind.ends_at is None:
            return tap.add(adapter, self.base.forward(view, x, *args, **kwargs))
        end = getattr(self, kind.ends_at)
        setattr(view, kind.ends_at, lambda out: end(tap.add(adapter, out)))
        return self.base.forward(view, x, *args, **kwargs)

    def _forward_prompted(self, view: Any, prompts: Prompts, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hasattr(self.attn, "num_prefix_tokens"):  # rotations by position begin after them
            attention: Any = ModuleView(cast(nn.Module, self.attn))
            attention.num_prefix_tokens = self.attn.num_prefix_tokens + prompts.length  # type: ignore[operator]
            view.attn = attention
        return prompts.take_out(self.base.forward(view, prompts.put_in(x), *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_block, (self.base,), self.__dict__


_CLASSES: dict[type[nn.Module], type[AdaptedBlock]] = {}


def adapted_class(base: type[nn.Module], kind: BlockKind) -> type[AdaptedBlock]:
    """The subclass of a block's class that runs adapters."""
    if base not in _CLASSES:
        made = type(f"Adapted{base.__name__}", (AdaptedBlock, base), {"base": base, "kind": kind})
        _CLASSES[base] = cast("type[AdaptedBlock]", made)
    return _CLASSES[base]


def _empty_block(base: type[nn.Module]) -> nn.Module:
    """For copying and pickling, since the class is made while the program runs."""
    block = base.__new__(base)
    kind = block_kind(block)
    if kind is None:
        raise TypeError(f"{forward_class(block)} is not a block that adapters are known for")
    cls = adapted_class(base, kind)
    return cls.__new__(cls)


def give_slot(block: nn.Module, kind: BlockKind, index: int) -> AdapterSlot:
    """Turns a block into one that can carry adapters, in place."""
    slot = AdapterSlot(index)
    slot.train(block.training)
    block.add_module(SLOT, slot)
    block.__class__ = adapted_class(type(block), kind)
    return slot


def take_slot(block: nn.Module) -> None:
    """Turns it back into what it was; its adapters are gone."""
    assert isinstance(block, AdaptedBlock)
    delattr(block, SLOT)
    block.__class__ = block.base  # type: ignore[assignment]


def adapters_in(slot: AdapterSlot, name: str) -> list[tuple[str, FusedMoSAAdapter]]:
    """The adapters of one name in a block, by site."""
    if name not in slot:
        return []
    sites = slot[name]
    assert isinstance(sites, nn.ModuleDict)
    return [(site, adapter) for site, adapter in sites.items() if isinstance(adapter, FusedMoSAAdapter)]
