"""Which backbone an adapter was trained on: its name in timm, its shape, and a hash of its weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from mosa_kernels.peft.block import AdapterSlot
from mosa_kernels.peft.book import BOOK, book_of, find_book
from mosa_kernels.peft.files import tensors_digest
from mosa_kernels.peft.head import head_paths


class BackboneMismatchError(ValueError):
    """An adapter was trained on another backbone."""


def backbone_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's parameters and saved buffers by timm's names, without classifier and adapters.

    They are those that the model came with, also while a baseline trains copies of them or an adapter is merged. Of
    layers whose state is more than tensors, as packed weights are, the tensors alone.
    """
    return {name: value.detach() for name, value in _backbone_state(model).items() if isinstance(value, Tensor)}


def _backbone_state(model: nn.Module) -> dict[str, Any]:
    """What `backbone_tensors` are the tensors of."""
    book = find_book(model)
    foreign = [f"{path}." for path in head_paths(model)]
    originals: dict[str, Tensor] = {}
    first = first_names(model)
    if book is not None:
        # Also where a block that stands in two places has them under its second name.
        slots = (
            path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, AdapterSlot)
        )
        foreign += [f"{BOOK}.", *(f"{path}." for path in slots)]
        originals = book.originals()
    return {
        name: originals.get(first.get(name, name), value)
        for name, value in model.state_dict().items()
        if not name.startswith(tuple(foreign))
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """For each name of a parameter, the first name of the same one: layers may share it."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(each, name) for name, each in model.named_parameters(remove_duplicate=False)}


def backbone_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that stand in the backbone's places just now, by timm's names."""
    known = backbone_tensors(model)
    return {path: parameter for path, parameter in model.named_parameters() if path in known}


def unfrozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's own parameters that take gradients, by timm's names: somebody has unfrozen them since."""
    book = book_of(model)
    tuned = book.tuned_by(book.active)
    return {
        path: parameter
        for path, parameter in backbone_parameters(model).items()
        if parameter.requires_grad and (tuned is None or path not in tuned.paths)
    }


def describe_backbone(model: nn.Module, unfrozen: Collection[str] = ()) -> dict[str, Any]:
    """Name, pre-training tag, pooling, shapes and SHA-256 of the backbone's weights, as JSON takes them.

    Args:
        model: with adapters or without.
        unfrozen: names of parameters that may differ, and are no part of the SHA-256.

    Raises:
        ValueError: the weights are on the meta device, or packed into what is no tensor.
    """
    tensors = backbone_tensors(model)
    packed = next((name for name in _backbone_state(model) if name not in tensors), None)
    if packed is not None:
        raise ValueError(
            f"model: expected tensors as the backbone's state, which tell it from others, got {packed}, which is none, "
            "as of torch.ao's quantised layers; save and load the adapter in the model as it was before"
        )
    first = first_names(model)
    meta = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise ValueError(f"model: expected one with weights, got {meta} on the meta device")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    # FSDP2 and torch.nn.utils.parametrize put a class of their own before it
    kind = next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.")).__name__
    return {
        "class": kind,
        "architecture": cfg.get("architecture") or kind,
        "tag": cfg.get("tag") or "",
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "global_pool": _pooling(model),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "shapes": _shapes(model, tensors),
        "unfrozen": sorted(unfrozen),
        "sha256": tensors_digest(
            {name: tensor for name, tensor in tensors.items() if first.get(name, name) not in unfrozen}
        ),
    }


def _pooling(model: nn.Module) -> str | None:
    """How timm pools the tokens before the classifier, which no weight shows; None where it is not said."""
    # The head first, which pools: timm 1.0.21 leaves the word of a Swin as it was when the head's changes.
    for holder in (getattr(model, "head", None), model):
        pooling = getattr(holder, "global_pool", holder)
        pooling = getattr(pooling, "pool_type", pooling)
        if isinstance(pooling, str):
            return pooling
    return None


def _shapes(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """By name; of linear layers as they compute, for quantisation packs weights and adds its scales to the state."""
    places = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    linear = {
        f"{path}.weight": [layer.out_features, layer.in_features]
        for path, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear)
    }
    return {name: linear.get(name, list(tensor.shape)) for name, tensor in tensors.items() if name in places}


def check_backbone(saved: dict[str, Any], model: nn.Module, ignore_hash: bool) -> None:
    """
    Raises:
        BackboneMismatchError: naming everything in which the model differs from the backbone that was saved.
    """
    here = describe_backbone(model, saved.get("unfrozen", ()))
    differences = []
    for key in ("architecture", "class"):
        if saved.get(key) != here[key]:
            differences.append(f"{key}: saved with {saved.get(key)!r}, the model is {here[key]!r}")
    differences += _shape_differences(saved.get("shapes") or {}, here["shapes"])
    if saved.get("global_pool", here["global_pool"]) != here["global_pool"] and not ignore_hash:
        differences.append(
            f"global_pool: saved with {saved['global_pool']!r}, the model has {here['global_pool']!r} "
            "(ignore_backbone_hash=True loads it all the same)"
        )
    if not differences and saved.get("sha256") != here["sha256"] and not ignore_hash:
        differences.append(f"hash of the weights: saved with {saved.get('sha256')}, the model has {here['sha256']}")
        for key in ("tag", "dtype"):
            if saved.get(key) != here[key]:
                differences.append(f"{key}: saved with {saved.get(key)!r}, the model has {here[key]!r}")
        differences.append("the names and shapes agree; ignore_backbone_hash=True loads it all the same")
    if differences:
        raise BackboneMismatchError("the adapter was trained on another backbone: " + "; ".join(differences))


def _shape_differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    found = [
        f"{name}: saved with shape {saved.get(name, 'none')}, the model has {here.get(name, 'none')}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    return found[:3] + ([f"and {len(found) - 3} more shapes"] if len(found) > 3 else [])
