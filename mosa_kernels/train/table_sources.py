"""Whether runs that are kept were made from the data and the weights that are there now.

A run's identity says where its data and weights come from, and nothing of what these files hold. Its record does: by
that, runs of the same data and weights are found wherever these lay.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from mosa_kernels.data.open import LISTED, NAMED
from mosa_kernels.train.backbones import create_backbone
from mosa_kernels.train.folder import read_json
from mosa_kernels.train.keeping import backbone_hash
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.setup import native_size, open_splits
from mosa_kernels.train.table_cells import Cell, data_settings


class Sources:
    """The data and weights that settings name, as they are now; each is opened once."""

    def __init__(self) -> None:
        self._fingerprints: dict[tuple[Settings, int], str] = {}
        self._hashes: dict[tuple[str, str | None, bool, int | None], str | Exception] = {}

    def fingerprint(self, settings: Settings) -> str:
        """Of the data.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: the data cannot be opened.
        """
        data = data_settings(settings)
        if data.data.partition(":")[0] in LISTED and not data.label_noise:
            data = dataclasses.replace(data, data_seed=0)
        key = (data, native_size(settings))
        if key not in self._fingerprints:
            self._fingerprints[key] = open_splits(*key).fingerprint
        return self._fingerprints[key]

    def weights(self, settings: Settings) -> str | Exception:
        """SHA-256 of the backbone's weights, or why they cannot be had."""
        key = (settings.model, settings.checkpoint, settings.pretrained, settings.image_size)
        if key not in self._hashes:
            name, checkpoint, pretrained, size = key
            try:
                model = create_backbone(name, 0, checkpoint=checkpoint, pretrained=pretrained, image_size=size)
                self._hashes[key] = backbone_hash(model)
            except (ValueError, OSError) as error:
                self._hashes[key] = error
        return self._hashes[key]


def require_same_sources(
    cells: Iterable[Cell], folder: Path, sources: Sources, say: Callable[[str], None] = lambda text: None
) -> None:
    """Refuses to put runs that were made from other data or weights beside those that are to come.

    Weights that cannot be had are not compared, which is said: then nothing new can be made of them, either.

    Args:
        cells: all that may be looked up.
        folder: of their files.
        sources: what is there now.
        say: hears what is done, as it may take a while, and what could not be compared.

    Raises:
        ValueError: naming files, what differs and what to do.
        FileNotFoundError, RuntimeError: the data cannot be opened.
    """
    kept = kept_files(cells, folder)
    if not kept:
        return
    say(f"comparing data and weights with those of {len(kept)} runs that are done")
    different: dict[str, list[str]] = {}
    unknown: dict[str, None] = {}
    for path, settings in kept.items():
        result = read_json(path)
        before, now = result.get("data", {}).get("fingerprint"), sources.fingerprint(settings)
        if before not in (None, now):
            what = f"data {settings.data} had the fingerprint {before[:12]}, now {now[:12]}"
            different.setdefault(what, []).append(path.name)
        before, weights = result.get("backbone", {}).get("sha256"), sources.weights(settings)
        if isinstance(weights, Exception):
            unknown[f"note: {settings.model} is not compared with that of the runs that are done: {weights}"] = None
        elif before not in (None, weights):
            place = f" from {settings.checkpoint}" if settings.checkpoint else ""
            what = f"backbone {settings.model}{place} had the sha256 {before[:12]}, now {weights[:12]}"
            different.setdefault(what, []).append(path.name)
    for text in unknown:
        say(text)
    if different:
        found = "; ".join(f"{what} ({_some(names)})" for what, names in different.items())
        raise ValueError(
            f"{folder}: expected runs of the data and weights that are there now, got others, which a table would mix: "
            f"{found}. Put back what was there, or give another output folder; or move these files out of {folder} to "
            "have their runs made again"
        )


def same_elsewhere(cells: Iterable[Cell], folder: Path, sources: Sources) -> dict[Path, Path]:
    """Runs that can stand in for cells that are not done: all is the same but where data and weights lay.

    So it is after a folder of data was moved, or with the runs of two machines in one folder.

    Args:
        cells: all that may be looked up.
        folder: of their files.
        sources: what is there now.

    Returns:
        The file of each such run by the file that the cell wants.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: the data cannot be opened.
    """
    files = _by_identity(folder)
    missing: dict[str, dict[str, Cell]] = {}
    for cell in cells if files else ():
        if cell.identity not in files and (anywhere := _placeless(cell)) != cell.identity:
            missing.setdefault(anywhere, {})[cell.identity] = cell
    found: dict[Path, Path] = {}
    for path in itertools.chain.from_iterable(files.values()) if missing else ():
        result = read_json(path)
        try:
            made = Cell("", Settings.from_dict(result["settings"]), test=result["on"] == "test")
        except (KeyError, ValueError):
            continue  # of another version
        for cell in missing.get(_placeless(made), {}).values():
            now = sources.fingerprint(cell.settings), sources.weights(cell.settings)
            if (result.get("data", {}).get("fingerprint"), result.get("backbone", {}).get("sha256")) == now:
                found[cell.path(folder)] = path
    return found


def _placeless(cell: Cell) -> str:
    """A hash of what decides the numbers of a run, but for its data and weights where these lie in files."""
    settings = cell.settings
    kind = settings.data.partition(":")[0]
    data = settings.data if kind in ("offline", *NAMED) else kind if kind in LISTED else "folder"
    checkpoint = None if settings.checkpoint is None else "file"
    anywhere = dataclasses.replace(settings, data=data, data_root=None, checkpoint=checkpoint)
    return dataclasses.replace(cell, settings=anywhere).identity


def kept_files(cells: Iterable[Cell], folder: Path) -> dict[Path, Settings]:
    """The files of the cells that are done, with the cells' settings."""
    files = _by_identity(folder)
    if not files:
        return {}
    return {path: cell.settings for cell in cells for path in files.get(cell.identity, [])}


def _by_identity(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        files.setdefault(path.stem.rpartition("-")[2], []).append(path)
    return files


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
