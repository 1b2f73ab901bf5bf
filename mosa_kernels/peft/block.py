"""A transformer block with adapters: timm's own forward, run with another FFN branch.

The block keeps its modules, parameters and their names. Its class becomes a subclass whose forward hands timm's forward
a view of the block, in which the one module where the residual stream enters the FFN's branch remembers the stream.
Hooks that keep the stream in an attribute do the same, but `torch.compile` refuses them under activation
checkpointing (a side effect inside a checkpointed region), and `torch.fx` loses them; the view lives for one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.peft.placement import BlockKind, block_kind, forward_class

SLOT = "mosa"
"""The attribute of a block that holds its adapters; they are saved as ``<block>.mosa.<adapter name>.<site>``."""


class AdapterSlot(nn.ModuleDict):
    """The adapters of one block: adapter name -> site -> adapter.

    Attributes:
        index: of the block, through all stages.
        active: the name of the adapter that runs, or None.
        record: where the block's outputs go, by its index, while `two_pass` collects them; else None.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.active: str | None = None
        self.record: dict[int, Tensor] | None = None

    def current(self) -> nn.ModuleDict | None:
        """The adapters that run, by site; None where the block computes as the backbone does."""
        if self.active is None or self.active not in self:
            return None
        adapters = self[self.active]
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

    def add(self, adapter: nn.Module, out: Tensor) -> Tensor:
        """``out + adapter(stream)``."""
        if self.stream is None:
            raise RuntimeError("the block did not pass its residual stream where it is known to")
        return adapter(self.stream.reshape(out.shape), residual=out, add_input=False)


class BlockView:
    """A block for the length of one call: what is set here stands in for what the block has."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class AdaptedBlock(nn.Module):
    """What a block's class becomes: ``class AdaptedX(AdaptedBlock, X)``, made by `adapted_class`."""

    carries_adapters = True
    base: type[nn.Module]
    kind: BlockKind
    mosa: AdapterSlot

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self.mosa.current()
        if adapters is None:
            out = self.base.forward(self, x, *args, **kwargs)
        else:
            out = self._forward_with(adapters, x, *args, **kwargs)
        if self.mosa.record is not None:
            self.mosa.record[self.mosa.index] = out
        return out

    def _forward_with(self, adapters: nn.ModuleDict, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = self.kind
        view: Any = BlockView(self)
        if "after_attention" in adapters:
            assert kind.attention is not None
            setattr(view, kind.attention, after(getattr(self, kind.attention), adapters["after_attention"]))
        if "after_ffn" in adapters:
            view.mlp = after(self.mlp, adapters["after_ffn"])  # type: ignore[arg-type]
        if "parallel_ffn" not in adapters:
            return self.base.forward(view, x, *args, **kwargs)

        adapter = adapters["parallel_ffn"]
        entry = kind.branch[0]
        if entry == "":
            return adapter(x, residual=self.base.forward(view, x, *args, **kwargs), add_input=False)
        if entry.endswith("[]"):
            branches = getattr(self, entry[:-2])
            tap = Tap(branches[0])
            setattr(view, entry[:-2], [tap, *branches[1:]])
        else:
            tap = Tap(getattr(self, entry))
            setattr(view, entry, tap)
        if kind.ends_at is None:
            return tap.add(adapter, self.base.forward(view, x, *args, **kwargs))
        end = getattr(self, kind.ends_at)
        setattr(view, kind.ends_at, lambda out: end(tap.add(adapter, out)))
        return self.base.forward(view, x, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_block, (self.base,), self.__dict__


def after(module: Callable[..., Tensor], adapter: nn.Module) -> Callable[..., Tensor]:
    """``y + adapter(y)`` of the module's output y."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return adapter(module(*args, **kwargs))

    return run


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
