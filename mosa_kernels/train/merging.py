"""Merging for inference, with the check that it changed nothing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mosa_kernels._weights import write_tensors
from mosa_kernels.peft import MoSAConfig, inject_adapter, merge_and_unload
from mosa_kernels.peft.book import book_of
from mosa_kernels.train.backbones import create_backbone
from mosa_kernels.train.evaluate import Predictions, merged_by, predict
from mosa_kernels.train.folder import read_json, require_own_or_new, versions, write_json
from mosa_kernels.train.keeping import backbone_hash
from mosa_kernels.train.settings import Settings

SUFFIXES = (".safetensors", ".pt2")
KIND = "a merged model"
STATE_DICT = f"{KIND} as a state dict; mosa_kernels.train.merging.load_merged rebuilds it"
PROGRAM = f"{KIND} as a program that needs PyTorch alone: torch.export.load(path).module()(images)"


@dataclass(frozen=True)
class MergeCheck:
    """Merged model against the same adapters in evaluation mode.

    Attributes:
        images: how many were compared.
        largest_difference: between two logits of an image.
        largest_logit: the largest magnitude among them, for scale.
        same_predictions: of how many images.
        before, after: predictions; their accuracies mean something where the labels do.
    """

    images: int
    largest_difference: float
    largest_logit: float
    same_predictions: int
    before: Predictions
    after: Predictions

    @property
    def unchanged(self) -> bool:
        """Whether logits agree to 1e-4 of the largest (rounding of fp32) and all predictions are the same."""
        close = self.largest_difference <= 1e-4 * max(1.0, self.largest_logit)
        return close and self.same_predictions == self.images

    def as_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "largest_difference": self.largest_difference,
            "largest_logit": self.largest_logit,
            "same_predictions": self.same_predictions,
            "unchanged": self.unchanged,
        }

    def sentence(self) -> str:
        """The finding in words."""
        verdict = "merging changed nothing" if self.unchanged else "MERGING CHANGED THE MODEL"
        return (
            f"{verdict}: largest logit difference {self.largest_difference:.1e} (logits up to "
            f"{self.largest_logit:.1f}), {self.same_predictions} of {self.images} predictions identical"
        )


def merged_copy(model: nn.Module, rule: str | None = None) -> nn.Module:
    """A merged copy in evaluation mode, for which PyTorch's operators suffice; the model itself stays as it is."""
    return merge_and_unload(copy.deepcopy(model), rule=rule).eval()


def check_merge(model: nn.Module, merged: nn.Module, loader: Iterable[Any], rule: str | None = None) -> MergeCheck:
    """Compares a model whose evaluation merges by `rule` with its merged copy.

    Args:
        model: with adapters.
        merged: from `merged_copy`.
        loader: of (images, labels).
        rule: the rule that `merged` was made by; None for the model's own.
    """
    if rule is None:
        before = predict(model, loader)
    else:
        with merged_by(model, rule):
            before = predict(model, loader)
    after = predict(merged, loader)
    difference = (before.logits - after.logits).abs().max().item()
    same = int((before.logits.argmax(1) == after.logits.argmax(1)).sum())
    return MergeCheck(len(before.labels), difference, before.logits.abs().max().item(), same, before, after)


def random_images(size: tuple[int, ...], count: int = 32, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of normally distributed images [count, *size] with meaningless labels, for a check without data."""
    generator = torch.Generator().manual_seed(seed)
    yield torch.randn(count, *size, generator=generator), torch.zeros(count, dtype=torch.int64)


def merged_card(
    model: nn.Module,
    settings: Settings,
    num_classes: int,
    rule: str,
    check: MergeCheck | None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What goes into the JSON file beside merged weights; `model` is the one before merging."""
    book = book_of(model)
    if book.active is None:
        raise ValueError("model: expected an active adapter, got one within disable_adapter")
    return {
        "kind": STATE_DICT,
        "rule": rule,
        "config": book.configs[book.active].to_dict(),
        "num_classes": num_classes,
        "class_names": None if class_names is None else list(class_names),
        "settings": settings.as_dict(),
        "backbone_sha256": backbone_hash(model),
        "check": None if check is None else check.as_dict(),
        "versions": versions(),
    }


def load_merged(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuilds the model of a .safetensors file of `mosa-kernels merge`: timm's architecture and dense adapters.

    Raises:
        FileNotFoundError: the file, or the JSON beside it, is missing.
        ValueError: they are not what `mosa-kernels merge` writes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a .safetensors file, got {path.name}; torch.export.load opens a .pt2")
    card = read_json(path.with_suffix(".json"))
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        settings, classes = Settings.from_dict(card["settings"]), int(card["num_classes"])
    except KeyError as error:
        raise ValueError(
            f"{path.with_suffix('.json')}: expected the card of a merged model, without {error}"
        ) from error
    model = create_backbone(settings.model, classes, pretrained=False, image_size=settings.image_size)
    model = merge_and_unload(inject_adapter(model, MoSAConfig.from_dict(card["config"])))
    model.load_state_dict(load_file(path))
    return model.eval()


def require_merged_or_new(path: Path) -> None:
    """Finds out before any work whether a merged model can be written there, with its card beside it.

    Raises:
        ValueError: it cannot, or there is something that is not a merged model.
    """
    files = path, path.with_suffix(".json")
    require_own_or_new(files, lambda card: str(card.get("kind", "")).startswith(KIND), KIND)
    _require_own_card(path)


def _require_own_card(path: Path) -> None:
    others = [path.with_suffix(suffix) for suffix in SUFFIXES if suffix != path.suffix]
    card = path.with_suffix(".json")
    if card.exists() and others[0].exists():
        raise ValueError(f"output: {card} is the card of {others[0].name} and would be lost; choose another name")


def write_merged(model: nn.Module, path: Path, card: dict[str, Any]) -> None:
    """Writes a plain state dict as safetensors, and beside it a JSON file that says what it is.

    Raises:
        ValueError: that JSON file belongs to a program of the same name.
    """
    _require_own_card(path)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "mosa_kernels": json.dumps({"rule": card.get("rule")})}
    write_tensors(path, tensors, metadata)
    write_json(path.with_suffix(".json"), card)
