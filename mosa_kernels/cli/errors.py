"""Errors that a user can mend, as one line instead of a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from safetensors import SafetensorError

# An OSError: files missing or in the way, no network, a full disk; of the last, safetensors has an error of its own.
MENDABLE = (ValueError, OSError, ModuleNotFoundError, SafetensorError)


class MendableError(Exception):
    """Something went wrong that the message explains fully."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Prints such errors as one line on stderr and exits with 1; MOSA_TRACEBACK=1 shows where they came from."""
    try:
        yield
    except (MendableError, *MENDABLE) as error:
        if os.environ.get("MOSA_TRACEBACK"):
            raise
        typer.echo(f"error: {message_of(error)}", err=True)
        raise typer.Exit(1) from error
    except RuntimeError as error:
        if os.environ.get("MOSA_TRACEBACK") or not is_out_of_memory(error):
            raise
        typer.echo(f"error: out of memory: {message_of(error).partition(chr(10))[0]}", err=True)
        raise typer.Exit(1) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU or of the machine, as PyTorch says it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def message_of(error: BaseException) -> str:
    """What an error says; of one in a DataLoader's worker, PyTorch gives the traceback, whose last line says it."""
    text = str(error).rstrip()
    first, _, rest = text.partition("\n")
    return rest.rpartition("\n")[2].partition(": ")[2] if "DataLoader worker process" in first and rest else text
