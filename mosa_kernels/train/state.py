"""The full training state as safetensors and JSON: a run goes on where it stopped, to the bit.

A state is a folder `epoch-0007` that is written under another name and then renamed, so that it is complete or absent;
the one before it is removed afterwards. Nothing is pickled.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "epoch-"
TENSORS, RECORD = "tensors.safetensors", "state.json"


class StateError(ValueError):
    """A file of a training state is damaged."""


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Moves the tensors of a nested structure of dicts, lists and scalars into `tensors`; returns the rest, for JSON.

    Raises:
        TypeError: something that neither a tensor file nor JSON can hold.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, flatten(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"state {name}: expected tensors, dicts, lists and plain values, got {type(value).__name__}")


def unflatten(record: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    ((kind, value),) = record.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require gradients, and all saved buffers."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Puts back what `trained_state` returned.

    Raises:
        ValueError: the model does not have the same trainable parameters and buffers.
    """
    expected = trained_state(model)
    if expected.keys() != state.keys():
        raise ValueError(
            f"training state: it does not fit the model; only in the model: {sorted(expected.keys() - state.keys())}, "
            f"only in the state: {sorted(state.keys() - expected.keys())}"
        )
    with torch.no_grad():
        for name, tensor in expected.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"training state {name}: expected shape {list(tensor.shape)}, got {list(state[name].shape)}"
                )
            tensor.copy_(state[name])


def random_state() -> dict[str, Any]:
    """The generators of Python, NumPy and PyTorch (all devices)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_part(directory: Path, part: str, state: dict[str, Any]) -> None:
    """Writes one process's share of a state into the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    record = flatten(state, part, tensors)
    save_file(tensors, directory / f"{part}.{TENSORS}")
    (directory / f"{part}.{RECORD}").write_text(json.dumps(record))


def read_part(directory: Path, part: str) -> dict[str, Any]:
    """Reads what `write_part` wrote.

    Raises:
        FileNotFoundError: the folder has no such part, for example because the run had fewer processes.
        StateError: one of its files is damaged.
    """
    path = directory / f"{part}.{RECORD}"
    if not path.is_file():
        raise FileNotFoundError(f"training state {directory}: no part {part!r}; was it saved by fewer processes?")
    weights = directory / f"{part}.{TENSORS}"
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise StateError(f"{weights}: damaged: {error}") from error
    try:
        state: dict[str, Any] = unflatten(json.loads(path.read_text()), tensors)
    except (ValueError, AttributeError, KeyError) as error:
        raise StateError(f"{path}: damaged: {error}") from error
    return state


def unfinished(root: Path, epoch: int) -> Path:
    """Where the state after `epoch` is written before `publish`."""
    return root / f"partial-{PREFIX}{epoch:04d}"


def publish(root: Path, epoch: int) -> Path:
    """Makes a completely written state the latest one and removes what is older."""
    final = root / f"{PREFIX}{epoch:04d}"
    if final.exists():
        shutil.rmtree(final)
    unfinished(root, epoch).rename(final)
    for other in root.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return final


def published(root: Path) -> list[tuple[int, Path]]:
    """The completely written states, the newest first: (epochs done, folder)."""
    if not root.is_dir():
        return []
    found = ((path.name.removeprefix(PREFIX), path) for path in root.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(((int(epoch), path) for epoch, path in found if epoch.isdecimal()), reverse=True)


def read_newest(root: Path, parts: Sequence[str], warn: Callable[[str], None]) -> tuple[int, dict[str, Any]]:
    """The newest state of which no file is damaged: (epochs done, its parts by name); (0, {}) where there is none.

    Args:
        root: of the states.
        parts: to be read.
        warn: hears of a damaged state that an older one stands in for.

    Raises:
        FileNotFoundError: a state has no such part.
        StateError: every state is damaged; the message says what is left.
    """
    states = published(root)
    for number, (done, path) in enumerate(states):
        try:
            found = {part: read_part(path, part) for part in parts}
        except StateError as error:
            if number + 1 == len(states):
                raise StateError(
                    f"training state {error}; there is no older one. The weights of the last epoch are in "
                    f"{root.parent / 'adapter'}; without the folder {root}, --resume begins with the first epoch"
                ) from error
            warn(f"warning: training state {error}; an older one is used")
            continue
        return done, found
    return 0, {}
