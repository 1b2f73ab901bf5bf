"""Saving and loading adapters with their heads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mosa_kernels.peft.backbone import (
    backbone_parameters,
    check_backbone,
    describe_backbone,
    unfrozen_parameters,
)
from mosa_kernels.peft.book import book_of, check_known, check_settled, check_unrouted, find_book, unwrap
from mosa_kernels.peft.config import MoSAConfig
from mosa_kernels.peft.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFileError,
    as_directory,
    read_adapter,
    write_adapter,
)
from mosa_kernels.peft.head import current_head, head_paths
from mosa_kernels.peft.inject import delete_adapter, inject_adapter
from mosa_kernels.peft.switch import run_one, set_adapter
from mosa_kernels.peft.tuned import Tuned
from mosa_kernels.shards import check_unsharded, fill, is_sharded, whole
from mosa_kernels.version import __version__

FORMAT = 1
ENTRIES = frozenset({"format", "mosa_kernels", "timm", "torch", "adapter_name", "config", "num_classes", "backbone"})
_ADAPTERS, _HEAD, _TUNED = "adapters.", "head.", "tuned."


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Writes an adapter with its splits and its head: `adapter_config.json` and `adapter_model.safetensors`.

    Of a baseline, what it trains: prompts, or its own version of the backbone's parameters.

    What is unfrozen of the backbone (its parameters whose `requires_grad` is True at the time) is saved with it. Its
    buffers, such as BatchNorm's running statistics, are not: they stand still as long as the model has adapters.

    The backbone's name in timm and the SHA-256 of its weights are recorded. A save that is interrupted leaves what was
    there before. Other files in the directory stay. Of a model that FSDP2 has sharded (`fully_shard`) every rank has to
    call this: the ranks put the tensors together, and the first one writes.

    Args:
        model: with adapters.
        directory: is made if need be.
        adapter_name: which adapter; None: the active one.

    Raises:
        TypeError: `directory` is no path.
        ValueError: the model has no adapters, or none of this name.
        NotADirectoryError: the directory, or one above it, is a file.
    """
    book = book_of(model)
    check_unrouted(book)
    folder = as_directory(directory)
    model = unwrap(model)
    name = book.active if adapter_name is None else adapter_name
    if name is None:
        raise ValueError("adapter_name: expected one, for within disable_adapter none is active")
    check_known(book, name)
    unfrozen = _unfrozen(model, name)
    description = {
        "format": FORMAT,
        "mosa_kernels": __version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
        "adapter_name": name,
        "config": book.configs[name].to_dict(),
        "num_classes": _classes(model, name),
        "backbone": describe_backbone(model, unfrozen),
    }
    tensors = {
        key: whole(tensor.detach()).cpu().contiguous().clone()
        for key, tensor in _tensors(model, name, unfrozen).items()
    }
    if any(map(is_sharded, model.parameters())) and torch.distributed.get_rank() != 0:
        return
    write_adapter(folder, description, tensors)


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    ignore_backbone_hash: bool = False,
    new_head: bool = False,
) -> nn.Module:
    """Loads what `save_adapter` wrote, in place, and makes it the active adapter. On any error the model is as before.

    A model without adapters, or without one of this name, gets them injected; an adapter of this name with the same
    configuration gets its weights replaced. What was unfrozen of the backbone becomes the adapter's own version of
    these parameters, which stands in the model while the adapter is active, and trains; the backbone stays as it was.
    (Of an adapter that is there already, those that are unfrozen in the model take the saved values.) A model that
    FSDP2 has sharded takes the weights of an adapter that it has; others are loaded before it is sharded.

    Args:
        model: the backbone that the adapter was trained on, with as many classes.
        directory: where both files are.
        adapter_name: a name for it; None: the one that it was saved under.
        ignore_backbone_hash: accepts a backbone of the same name and shapes with other weights, or another pooling.
        new_head: gives the adapter a head of its own where the model has another number of classes.

    Returns:
        The model.

    Raises:
        TypeError: `directory` is no path.
        FileNotFoundError, NotADirectoryError: the directory or a file in it is missing, or it is a file itself.
        AdapterFileError: a file is damaged, or not what `save_adapter` writes.
        BackboneMismatchError: the backbone is another; the message says in what.
        ValueError: the head has another size, the name is taken by an adapter with another configuration, or an
            adapter is merged into the frozen weights.
    """
    folder = as_directory(directory)
    description, tensors = read_adapter(folder)
    config, saved_name, num_classes = _read_description(description, folder / CONFIG_FILE)
    name = saved_name if adapter_name is None else adapter_name
    inner = unwrap(model)
    if find_book(inner) is not None:
        check_settled(book_of(inner))
    check_backbone(description["backbone"], inner, ignore_backbone_hash)
    book = find_book(inner)
    known = book is not None and name in book.configs
    if book is not None and known and book.configs[name] != config:
        raise ValueError(
            f"adapter_name: {name!r} is taken by an adapter with another configuration: "
            + _differences(book.configs[name], config)
        )
    here = _classes(inner, name)
    if here != num_classes and (known or not new_head):
        raise ValueError(
            f"head: the adapter was saved with {num_classes} classes, the model has {here}; make the model with "
            f"num_classes={num_classes}" + ("" if known else ", or give the adapter a head of its own by new_head=True")
        )

    active = None if book is None else book.active
    if not known:
        inject_adapter(model, config, name, num_classes=num_classes if here != num_classes else None)
    try:
        _load_tensors(inner, name, tensors, folder / WEIGHTS_FILE, description["backbone"].get("unfrozen", []), known)
    except Exception:
        if not known:
            delete_adapter(inner, name)
            if active is not None:
                set_adapter(inner, active)
            elif book is not None:  # within `disable_adapter`
                run_one(inner, book, None)
        raise
    set_adapter(model, name)
    return model


def _unfrozen(model: nn.Module, name: str) -> set[str]:
    """The backbone's parameters that train with an adapter and not by its method."""
    book = book_of(model)
    tuned = book.tuned_by(name)
    return {*unfrozen_parameters(model), *([] if tuned is None else tuned.beyond(book.configs[name].method))}


def _tensors(model: nn.Module, name: str, unfrozen: Iterable[str]) -> dict[str, Tensor]:
    """The very tensors: ``adapters.<block>.<site>.<tensor>``, of a baseline and of what is unfrozen ``tuned.<name in
    the model>``, and, of the adapter's head, ``head.<path>.<tensor>``."""
    book = book_of(model)
    found = {
        f"{_ADAPTERS}{path}.{site}.{key}": tensor
        for path, site, module in (*book.adapters(name), *book.prompts(name))
        for key, tensor in module.state_dict(keep_vars=True).items()
    }
    tuned = book.tuned_by(name)
    own = {} if tuned is None else tuned.tensors()
    in_model = [*unfrozen, *(own if name == book.active else ())]
    values = {path: (book.folded or {}).get(path, model.get_parameter(path)) for path in in_model}
    if name != book.active:
        values |= own
    found |= {f"{_TUNED}{path}": value for path, value in values.items()}
    head = current_head(model) if name == book.active else book.heads[name]
    for path, module in zip(head_paths(model), head.children(), strict=True):
        found |= {f"{_HEAD}{path}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return found


def _load_tensors(
    model: nn.Module, name: str, tensors: dict[str, Tensor], path: Path, unfrozen: list[str], known: bool
) -> None:
    """Copies everything in after everything was found to fit."""
    parameters = backbone_parameters(model)
    unfrozen = [each for each in unfrozen if each in parameters]
    places = _tensors(model, name, unfrozen)
    missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or unexpected:
        raise AdapterFileError(
            f"{path}: it does not fit its configuration: missing {missing[:3] or 'nothing'}, unexpected "
            f"{unexpected[:3] or 'nothing'}"
        )
    for key, place in places.items():
        if place.shape != tensors[key].shape:
            raise AdapterFileError(f"{path}: {key}: expected shape {list(place.shape)}, got {list(tensors[key].shape)}")
    _check_splits(model, name, tensors, path)
    in_place = unfrozen_parameters(model) if known else {}
    _give_own(model, name, [each for each in unfrozen if each not in in_place])
    with torch.no_grad():
        for key, place in _tensors(model, name, unfrozen).items():
            fill(place, tensors[key])


def _give_own(model: nn.Module, name: str, paths: list[str]) -> None:
    """Gives an adapter versions of its own of these parameters of the backbone."""
    book = book_of(model)
    tuned = book.tuned_by(name)
    paths = [path for path in paths if tuned is None or path not in tuned.paths]
    if not paths:
        return
    check_unsharded(model, "load before it is sharded")
    if tuned is None:
        tuned = book.tuned[name] = Tuned({})
    elif name == book.active:
        tuned.exchange(model)
    tuned.add({path: model.get_parameter(path) for path in paths})
    if name == book.active:
        tuned.exchange(model)


def _check_splits(model: nn.Module, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    """A split is for as many experts as the configuration says; without biases for each no shape tells."""
    for block, site, adapter in book_of(model).adapters(name):
        for side in ("down", "up"):
            key = f"{_ADAPTERS}{block}.{site}.{side}.assignment"
            highest = int(tensors[key].max()) if key in tensors else 0
            if highest >= adapter.num_experts:
                raise AdapterFileError(
                    f"{path}: num_experts: the configuration has {adapter.num_experts}, the split {key} names expert "
                    f"{highest}"
                )


def _read_description(description: dict[str, Any], path: Path) -> tuple[MoSAConfig, str, int]:
    if description.get("format") != FORMAT:
        raise AdapterFileError(
            f"{path}: format: expected {FORMAT}, got {description.get('format')!r}; update mosa_kernels"
        )
    unknown = sorted(description.keys() - ENTRIES)
    if unknown:
        raise AdapterFileError(
            f"{path}: {', '.join(map(repr, unknown))}: no such entry; expected {', '.join(sorted(ENTRIES))}, and the "
            "options in config; a newer mosa_kernels may know more"
        )
    types = {"config": dict, "adapter_name": str, "num_classes": int, "backbone": dict}
    for key, kind in types.items():
        if not isinstance(description.get(key), kind):
            raise AdapterFileError(f"{path}: {key}: expected a {kind.__name__}, got {description.get(key)!r}")
    unfrozen = description["backbone"].get("unfrozen", [])
    if not isinstance(unfrozen, list) or not all(isinstance(each, str) for each in unfrozen):
        raise AdapterFileError(f"{path}: backbone: unfrozen: expected a list of names, got {unfrozen!r}")
    try:
        config = MoSAConfig.from_dict(description["config"])
    except (TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: config: {error}") from error
    return config, description["adapter_name"], description["num_classes"]


def _classes(model: nn.Module, name: str) -> int:
    """How many classes the head tells apart that the adapter of this name has, or would start from."""
    book = find_book(model)
    if book is None or name == book.active:
        return current_head(model).num_classes
    if name in book.heads:
        return book.heads[name].num_classes  # type: ignore[return-value]
    return (current_head(model) if book.backbone_head is None else book.backbone_head).num_classes


def _differences(ours: MoSAConfig, theirs: MoSAConfig) -> str:
    mine, saved = ours.to_dict(), theirs.to_dict()
    return ", ".join(f"{key} is {mine[key]!r}, saved with {saved[key]!r}" for key in mine if mine[key] != saved[key])
