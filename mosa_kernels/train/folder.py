"""A run's folder: what was asked for, what happened, and the result, each file complete or absent."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mosa_kernels._files import left_partial, write_whole

CONFIG, METRICS, RESULT, CURVE = "config.json", "metrics.jsonl", "result.json", "curve.png"
LOCK = ".lock"
TRANSFORMS = "transforms"  # the entry of a config whose "normalisation" says what test images really go through
PACKAGES = ("torch", "timm", "accelerate", "numpy", "safetensors")


class RunExistsError(ValueError):
    """The folder holds a run already."""


class SettingsDifferError(ValueError):
    """A run cannot be continued with other settings than it began with."""


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whatever the locale, under a temporary name and renames it."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Finds out before any work whether a file, or a folder with files in it, can be written there; makes nothing.

    Raises:
        ValueError: something else is in the way, or this user may not write there.
    """
    if path.exists() and path.is_dir() != folder:
        wanted, found = ("folder", "file") if folder else ("file", "folder")
        raise ValueError(f"output: expected a {wanted}, {path} is a {found}")
    place = next(place for place in (*((path,) if folder else ()), *path.absolute().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"output {path}: it cannot be made, for {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"output {path}: no permission to write in {place}")


def require_own_or_new(files: Sequence[Path], is_own: Callable[[dict[str, Any]], bool], what: str) -> None:
    """Finds out before any work whether files that belong together can be written, over others of their kind alone.

    Args:
        files: the last is JSON, which says what all of them are.
        is_own: whether a record found there says that they are of this kind.
        what: the kind, in words.

    Raises:
        ValueError: they cannot be written, or something else is there.
    """
    for file in files:
        require_writable(file)
    found = [file for file in files if file.exists()]
    if found and not (files[-1].is_file() and is_own(read_json(files[-1]))):
        raise ValueError(f"output: {found[0]} is there and is not {what}; choose another name")


def write_json(path: Path, record: Any) -> None:
    """Writes JSON that any reader takes: numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(record), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        record = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected JSON in UTF-8, got other bytes at {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else at line {error.lineno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(record).__name__}")
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Of Python, this package and what decides its numbers."""
    from importlib.metadata import PackageNotFoundError, version

    from mosa_kernels.version import __version__

    found = {"python": platform.python_version(), "mosa_kernels": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


class RunFolder:
    """The files of one run.

    config.json     everything needed to run it again
    metrics.jsonl   one line an epoch
    curve.png       loss and accuracy over the epochs
    adapter/best, adapter/last
    state/          the full training state after the last complete epoch
    result.json     at the end: the test accuracy and how it was chosen
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def result(self) -> Path:
        return self.path / RESULT

    @property
    def curve(self) -> Path:
        return self.path / CURVE

    @property
    def best(self) -> Path:
        return self.path / "adapter" / "best"

    @property
    def last(self) -> Path:
        return self.path / "adapter" / "last"

    @property
    def state(self) -> Path:
        return self.path / "state"

    def require_new(self) -> None:
        """Raises a RunExistsError where there is a run, or something else, in the folder."""
        if self.config.exists():
            raise RunExistsError(f"output {self.path}: it holds a run; go on with --resume, or choose another folder")
        own = {self.path / LOCK, *left_partial(self.config)}
        if self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - own):
            raise RunExistsError(f"output {self.path}: expected a new or empty folder, it holds other things")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context, no other process may enter it; where there are no locks, all may.

        Raises:
            RunExistsError: another process is in the folder.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
            except (BlockingIOError, PermissionError) as error:
                raise RunExistsError(f"output {self.path}: another process is at work on this run") from error
            except OSError:  # a file system without locks
                pass
            yield

    def begin(self, config: dict[str, Any]) -> None:
        """Makes a new folder with its config; see `require_new`."""
        self.require_new()
        for partial in left_partial(self.config):
            partial.unlink(missing_ok=True)
        write_json(self.config, config)

    def read_config(self) -> dict[str, Any]:
        """The config of the run.

        Raises:
            FileNotFoundError: there is no run in the folder.
            ValueError: config.json is not that of a run.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"output {self.path}: there is no run to resume or read (no {CONFIG})")
        config = read_json(self.config)
        absent = [key for key in ("settings", "data", "backbone", "versions") if not isinstance(config.get(key), dict)]
        if absent:
            raise ValueError(f"{self.config}: expected the record of a run, it has no {', '.join(absent)}")
        return config

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a line cut short by a crash is left away."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def forget_after(self, epochs: int) -> list[dict[str, Any]]:
        """Drops the lines of epochs that the training state does not know, and returns the rest."""
        rows = [row for row in self.rows() if row["epoch"] <= epochs]
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return rows


def require_same(before: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """Raises a SettingsDifferError that names every difference between two flat records."""
    differences = [
        f"{key}: the run has {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise SettingsDifferError(f"resume: other {what} than the run began with: {'; '.join(differences)}")
