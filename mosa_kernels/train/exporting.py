"""A merged model as a program of `torch.export`, which runs where neither this package nor timm is installed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from mosa_kernels._files import write_whole
from mosa_kernels.train.folder import write_json

SUFFIX = ".pt2"


def export_program(model: nn.Module, size: tuple[int, ...]) -> ExportedProgram:
    """Exports a merged model for float32 images [B, *size]: any B where the model's code allows that, else B = 1.

    Args:
        model: from `merged_copy`, on the CPU.
        size: of an image, [3, H, W].

    Raises:
        ValueError: the model cannot be exported, or the program computes something else than the model.
    """
    images = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: Dim("batch", min=1)},))
        except (RuntimeError, ValueError):
            program = _export_single(model, images[:1])
        expected = model(images)
        parts = images.split(3 if takes_any_batch(program) else 1)
        found = torch.cat([program.module()(part) for part in parts])
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= 1e-4 * max(1.0, scale):
        raise ValueError(f"output: the exported program's logits differ by {difference:.1e} from the model's")
    return program


def _export_single(model: nn.Module, images: torch.Tensor) -> ExportedProgram:
    try:
        return torch.export.export(model, (images,))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"output: torch.export does not take this model ({str(error).strip().splitlines()[0]}); "
            "a .safetensors file keeps its weights"
        ) from error


def takes_any_batch(program: ExportedProgram) -> bool:
    """Whether images may come in batches of any size, rather than one by one."""
    return bool(program.range_constraints)


def write_program(program: ExportedProgram, path: Path, card: dict[str, Any]) -> None:
    """Writes the program, and beside it a JSON file that says what it is."""
    saved = io.BytesIO()  # on a full disk, PyTorch's own writing ends the process
    torch.export.save(program, saved)
    content = saved.getvalue()  # a view that an error keeps would crash the garbage collector of Python 3.12
    write_whole(path, lambda partial: partial.write_bytes(content))
    write_json(path.with_suffix(".json"), {**card, "batch": "any" if takes_any_batch(program) else 1})
