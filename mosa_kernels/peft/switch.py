"""Which of a model's adapters runs, and which trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mosa_kernels.peft.book import AdapterBook, book_of, check_known, unwrap
from mosa_kernels.peft.head import Head, current_head, install_head


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Makes an adapter, with its head, the one that runs and the only one that trains.

    Returns:
        The model.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    book = book_of(model)
    check_known(book, name)
    _run(unwrap(model), book, name)
    for other in book.configs:
        for _, _, adapter in book.adapters(other):
            adapter.requires_grad_(other == name)
    for other, head in book.heads.items():
        head.requires_grad_(other == name)
    current_head(unwrap(model)).requires_grad_(True)
    return model


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that runs; None within `disable_adapter`.

    Raises:
        ValueError: the model has no adapters.
    """
    return book_of(model).active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order of injection.

    Raises:
        ValueError: the model has no adapters.
    """
    return list(book_of(model).configs)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes what the backbone computed, with the head that it came with.

    Raises:
        ValueError: the model has no adapters.
    """
    book = book_of(model)
    before = book.active
    _run(unwrap(model), book, None)
    try:
        yield
    finally:
        _run(unwrap(model), book, before)


def _run(model: nn.Module, book: AdapterBook, name: str | None) -> None:
    """Puts the head of `name` (None: the backbone's) into the model, the one in use away, and sets every block."""
    if name != book.active:
        if book.active is not None and book.active not in book.heads:
            book.heads[book.active] = current_head(model)
        if name is None:
            head, book.backbone_head = book.backbone_head, None
        else:
            if book.backbone_head is None:
                book.backbone_head = current_head(model)
            head = _taken(book, name)
        assert head is not None
        install_head(model, head.train(model.training))
    book.active = name
    for slot in book.slots():
        slot.active = name


def _taken(book: AdapterBook, name: str) -> Head:
    head = book.heads[name]
    assert isinstance(head, Head)
    del book.heads[name]
    return head
