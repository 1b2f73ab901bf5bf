"""Errors that a user can mend, as one line instead of a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

MENDABLE = (
    ValueError,
    OSError,
    ModuleNotFoundError,
)  # an OSError: files missing or in the way, no network, a full disk


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
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
