"""What a run keeps of its model: adapters with their head, or the head alone after linear probing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mosa_kernels._files import write_whole
from mosa_kernels._weights import write_tensors
from mosa_kernels.peft import load_adapter, save_adapter
from mosa_kernels.peft.backbone import describe_backbone
from mosa_kernels.peft.book import find_book
from mosa_kernels.train.folder import read_json, write_json
from mosa_kernels.train.state import load_trained_state, trained_state

HEAD_WEIGHTS = "head.safetensors"
CLASSES = "classes.json"
BACKBONE = "backbone_sha256"


def save_trained(model: nn.Module, directory: Path, class_names: Sequence[str]) -> None:
    """Writes the active adapter as `save_adapter` does; of a model without adapters, what trains and the buffers.

    A file beside the weights names the outputs.
    """
    write_json(directory / CLASSES, {"class_names": list(class_names)})
    if find_book(model) is not None:
        save_adapter(model, directory)
        return
    tensors = {name: tensor.detach().cpu() for name, tensor in trained_state(model).items()}
    metadata = {BACKBONE: backbone_hash(model), "format": "pt"}
    write_tensors(directory / HEAD_WEIGHTS, tensors, metadata)


def load_trained(model: nn.Module, directory: Path) -> None:
    """Puts back what `save_trained` wrote, into the same backbone.

    Raises:
        FileNotFoundError: there is nothing of the kind in the folder.
        ValueError: a file is damaged, or belongs to another model or backbone.
    """
    weights = directory / HEAD_WEIGHTS
    if not weights.is_file():
        load_adapter(model, directory)
        return
    if find_book(model) is not None:
        raise ValueError(f"{directory}: it holds the head of a linear probe, the model has adapters")
    try:
        with safe_open(weights, framework="pt") as file:
            recorded = (file.metadata() or {}).get(BACKBONE)
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: damaged: {error}") from error
    here = backbone_hash(model)
    if recorded != here:
        raise ValueError(f"{weights}: the head was trained on other backbone weights ({recorded}, now {here})")
    load_trained_state(model, tensors)


def read_class_names(directory: Path) -> tuple[str, ...] | None:
    """The names of the outputs, where whoever saved the weights wrote them down."""
    path = directory / CLASSES
    return tuple(read_json(path)["class_names"]) if path.is_file() else None


def copy_trained(source: Path, target: Path) -> None:
    """Copies what `save_trained` wrote, file by file, each complete or as it was."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        write_whole(target / path.name, partial(shutil.copyfile, path))


def backbone_hash(model: nn.Module) -> str:
    """SHA-256 of the backbone's weights, without classifier and adapters."""
    found: str = describe_backbone(model)["sha256"]
    return found
