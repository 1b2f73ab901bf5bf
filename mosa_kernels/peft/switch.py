"""Which of a model's adapters runs, and which trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mosa_kernels.peft.book import AdapterBook, book_of, check_known, check_settled, find_book, is_kept_in_step, unwrap
from mosa_kernels.peft.head import Head, current_head, install_head
from mosa_kernels.shards import check_unsharded


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Makes an adapter (or baseline), with its head, the one that runs and the only one that trains.

    What trained before requires no gradient from here on, and PyTorch drops, without a word, gradients of parameters
    that do not require one when `backward()` runs: differentiate an adapter's loss before you switch to the next.

    A DistributedDataParallel goes on keeping in step only what trained when it was made: a warning says so.

    Returns:
        The model.

    Raises:
        ValueError: the model has no adapter of this name, one is merged into the frozen weights, or it is a baseline
            with its own version of parameters that FSDP2 has sharded.
    """
    book = book_of(model)
    check_known(book, name)
    if is_kept_in_step(model) and name != book.active:
        warnings.warn(
            f"model: DistributedDataParallel keeps in step only what trained when it was made, which {name!r} did not; "
            "to train it, wrap the model again",
            stacklevel=2,
        )
    run_one(unwrap(model), book, name)
    let_train(unwrap(model), book, {name})
    return model


def let_train(model: nn.Module, book: AdapterBook, names: set[str]) -> None:
    """The adapters and heads of these names take gradients, the others do not; one of the names is active."""
    for slot in book.slots():
        for other, adapters in slot.items():
            adapters.requires_grad_(other in names)
    for other, head in book.heads.items():
        head.requires_grad_(other in names)
    current_head(model).requires_grad_(book.active in names)
    tuned = book.tuned_by(book.active)
    for path in [] if tuned is None else tuned.paths:
        model.get_parameter(path).requires_grad_(True)


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

    Afterwards the adapter that was active is so again; if it was deleted meanwhile, the first of the others.

    Raises:
        ValueError: the model has no adapters.
    """
    book = book_of(model)
    before, tuned = book.active, book.tuned_by(book.active)
    parameters = [unwrap(model).get_parameter(path) for path in ([] if tuned is None else tuned.paths)]
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    run_one(unwrap(model), book, None)
    try:
        yield
    finally:
        if find_book(model) is not book:
            pass  # all adapters were deleted or merged
        elif before is not None and (book.active is not None or before not in book.configs):
            # and lets it train
            set_adapter(unwrap(model), before if before in book.configs else next(iter(book.configs)))
        else:
            run_one(unwrap(model), book, before)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)


def run_one(model: nn.Module, book: AdapterBook, name: str | None) -> None:
    """Puts the head of `name` (None: the backbone's) into the model, the one in use away, and sets every block."""
    check_settled(book)
    if name != book.active:
        _exchange_tuned(model, book, name)
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


def _exchange_tuned(model: nn.Module, book: AdapterBook, name: str | None) -> None:
    before, after = book.tuned_by(book.active), book.tuned_by(name)
    if before is not None or after is not None:
        check_unsharded(model, "switch before it is sharded")
    if before is not None:
        before.requires_grad_(False)
        for path in before.paths:
            model.get_parameter(path).requires_grad_(False)
        before.exchange(model)
    if after is not None:
        after.exchange(model)


def _taken(book: AdapterBook, name: str) -> Head:
    head = book.heads[name]
    assert isinstance(head, Head)
    del book.heads[name]
    return head
