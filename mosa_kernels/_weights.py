"""Files of tensors: safetensors, complete or as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from mosa_kernels._files import write_whole


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors that share no memory; the same ones with the same metadata give the same bytes."""

    def write(partial: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata))
        _sort_metadata(partial)

    write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """Of several entries, safetensors leaves the order to chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # else it was escaped in another way, and stays as it is
            file.seek(8)
            file.write(text.ljust(size))
