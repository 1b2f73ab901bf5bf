"""Files that are complete, or as they were."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a new file beside `path`, which then takes its place; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, for two processes may write the same file.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.touch(exist_ok=False)
    rights = partial.stat().st_mode  # of any new file: to ask for the process's mask is to change it for all threads
    try:
        write(partial)
        partial.chmod(rights & 0o777)  # safetensors leaves a file to its owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def left_partial(path: Path) -> list[Path]:
    """What killed processes left of writing the file, if none is writing it now."""
    if not path.parent.is_dir():
        return []
    name = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.partial")
    return sorted(other for other in path.parent.iterdir() if name.fullmatch(other.name))


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path that may begin with "~"; where nobody has that home, it is the folder of that name."""
    return Path(os.path.expanduser(path))  # `Path.expanduser` raises a RuntimeError
