"""An adapter on disk: adapter_config.json and adapter_model.safetensors, each complete or as it was."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosa_kernels._files import write_whole
from mosa_kernels._weights import write_tensors
from mosa_kernels.backends.element_types import PLAIN
from mosa_kernels.shards import whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_EMBEDDED, _DIGEST, _SAVE = "adapter_config", "tensors_sha256", "save_sha256"


class AdapterFileError(ValueError):
    """A saved adapter is damaged, or not one."""


def as_directory(directory: str | os.PathLike[str]) -> Path:
    """
    Raises:
        TypeError: it is no path.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise TypeError(f"directory: expected a path, got {type(directory).__name__}")
    return Path(directory)


def write_adapter(directory: Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes both files under temporary names and renames them.

    The description is in the weights file as well: whoever is interrupted between the two renames leaves the weights of
    one save beside the JSON of another, and `read_adapter` then goes by the weights' own.

    Raises:
        NotADirectoryError: the directory, or one above it, is a file.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"directory: expected a directory, or a place for one, got {directory}, where a file is in the way"
        ) from error
    description = {**description, _DIGEST: tensors_digest(tensors)}
    description[_SAVE] = hashlib.sha256(json.dumps(description).encode()).hexdigest()
    text = json.dumps(description, indent=2) + "\n"
    write_whole(directory / CONFIG_FILE, lambda path: path.write_text(text))
    write_tensors(directory / WEIGHTS_FILE, tensors, {_EMBEDDED: text, "format": "pt"})


def read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, as `write_adapter` was given it, and the tensors, on the CPU.

    Raises:
        NotADirectoryError: it is a file.
        FileNotFoundError: the directory or one of the files is missing.
        AdapterFileError: a file is damaged.
    """
    if directory.is_file():
        raise NotADirectoryError(f"directory: expected one that save_adapter wrote, got {directory}, a file")
    if not directory.is_dir():
        raise FileNotFoundError(
            f"directory: expected one that save_adapter wrote, got {directory}, which does not exist"
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"directory: expected {name} in {directory}, which is not there")
    description = _parse((directory / CONFIG_FILE).read_bytes(), directory / CONFIG_FILE)
    weights = directory / WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt") as file:
            embedded = (file.metadata() or {}).get(_EMBEDDED)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{weights}: damaged: {error}") from error
    if embedded is None:
        raise AdapterFileError(f"{weights}: not a file that save_adapter wrote: it carries no description")
    own = _parse(embedded.encode(), weights)
    if tensors_digest(tensors) != own.get(_DIGEST):
        raise AdapterFileError(f"{weights}: damaged: its tensors are not those that were saved (SHA-256 differs)")
    if description.get(_SAVE) != own.get(_SAVE):
        warnings.warn(
            f"{directory / CONFIG_FILE} belongs to another save than {WEIGHTS_FILE}, as after an interrupted save; "
            "using the description inside the weights",
            stacklevel=3,
        )
        description = own
    return {key: value for key, value in description.items() if key not in (_DIGEST, _SAVE)}, tensors


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in hexadecimal; of sharded tensors every rank has to ask."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for part, tensor in _parts(name, whole(tensors[name].detach())):
            digest.update(f"{part} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor itself, or those that one of a class of its own is made of, as of torchao's quantised weights."""
    if type(tensor) in PLAIN or not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _parts(f"{name}.{part}", getattr(tensor, part))


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(data)
    except ValueError as error:
        raise AdapterFileError(f"{path}: damaged: not JSON ({error})") from error
    if not isinstance(description, dict):
        raise AdapterFileError(f"{path}: expected a JSON object, got {type(description).__name__}")
    return description
