"""Several tasks in one forward pass over one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from mosa_kernels.peft.book import AdapterBook, book_of, check_known, check_settled, unwrap
from mosa_kernels.peft.head import Head, current_head, install_head
from mosa_kernels.peft.route import RoutedHead, Routes
from mosa_kernels.peft.switch import let_train


@contextmanager
def adapters_per_sample(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """Within the context each image of a batch meets the adapter, and the head, that is named for it.

    The backbone runs once over the whole batch, every adapter once over its own images. The logits are [B, classes] for
    the task with the most classes; an image of a task with fewer has -inf for the classes that its task lacks, so that
    softmax, cross-entropy and argmax need no further care. All adapters named take gradients within the context, and
    PyTorch drops, without a word, gradients of parameters that do not require one when `backward()` runs: call it
    within the context, and make the optimizer there too.

        names = ["birds", "cars", "cars"]  # the task of each image
        with adapters_per_sample(model, names):
            optimizer = MoSAAdamW(model, lr=1e-3)
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

    Args:
        model: with these adapters, of any styles; baselines other than "linear" change the backbone for everyone, and
            do not mix.
        names: an adapter for each image, in order.

    Raises:
        TypeError: `names` is no list of names.
        ValueError: a name is unknown or does not mix, `names` is empty, the model has no adapters or is within
            `disable_adapter`, or an adapter is merged. In the context: the batch has another size.
    """
    book = book_of(model)
    check_settled(book)
    inner = unwrap(model)
    _check_names(book, names)
    if book.active is None:
        raise ValueError("model: expected an active adapter, got one within disable_adapter")
    routes = Routes(list(names), next(inner.parameters()).device)
    own = current_head(inner)
    heads = {name: own if name == book.active else book.heads[name] for name in routes.groups}
    trained = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    modes = [(module, module.training) for head in heads.values() for module in head.modules()]
    let_train(inner, book, set(routes.groups))
    install_head(inner, _routed(routes, heads).train(inner.training))  # type: ignore[arg-type]
    for slot in book.slots():
        slot.routes = routes
    try:
        yield model
    finally:
        for slot in book.slots():
            slot.routes = None
        install_head(inner, own)
        for module, mode in modes:
            module.training = mode
        own.train(inner.training)
        for parameter, flag in trained:
            parameter.requires_grad_(flag)


def _routed(routes: Routes, heads: dict[str, Head]) -> Head:
    """One head of the shape of each: two modules for distilled models."""
    places = {name: list(head) for name, head in heads.items()}
    count = len(next(iter(places.values())))
    modules = [RoutedHead(routes, {name: modules[i] for name, modules in places.items()}) for i in range(count)]
    return Head(modules, max(head.num_classes for head in heads.values()))


def _check_names(book: AdapterBook, names: Sequence[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names: expected a list with an adapter's name for each image, got {names!r}")
    if not names:
        raise ValueError("names: expected one for each image, got none")
    for name in dict.fromkeys(names):
        check_known(book, name)
        method = book.configs[name].method
        if method not in ("adapter", "linear"):
            raise ValueError(f"names: {name!r} is of method {method!r}, which changes the backbone for every image")
        if book.tuned_by(name) is not None:
            raise ValueError(f"names: {name!r} has parameters of the backbone of its own, which every image meets")
