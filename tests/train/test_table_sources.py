"""A folder of runs is not continued with other data or weights than it was begun with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mosa_kernels.data.backbone import OFFLINE_BACKBONE, weights_of
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.table_cells import Cell, run_and_keep
from mosa_kernels.train.table_runs import missing_cells
from mosa_kernels.train.table_sources import Sources, require_same_sources, same_elsewhere


@pytest.fixture
def kept(tiny: Any, pictures: Path, tmp_path: Path) -> tuple[Cell, Path]:
    """A run that is done, on pictures and weights of its own."""
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copy(weights_of(OFFLINE_BACKBONE), tmp_path / "weights.safetensors")
    options = {"data": str(tmp_path / "data"), "checkpoint": str(tmp_path / "weights.safetensors")}
    cell = Cell("a run", tiny(method="linear", epochs=1, select="last", **options), test=True)
    run_and_keep(cell, tmp_path / "cells")
    return cell, tmp_path


def test_what_is_the_same_is_taken(kept: tuple[Cell, Path]) -> None:
    cell, place = kept
    told: list[str] = []
    require_same_sources([cell, cell], place / "cells", Sources(), told.append)
    assert told == ["comparing data and weights with those of 1 runs that are done"]
    require_same_sources([cell], place / "nothing", Sources(), told.append)
    assert len(told) == 1


def test_other_data_are_refused(kept: tuple[Cell, Path]) -> None:
    cell, place = kept
    Image.new("RGB", (32, 32)).save(place / "data" / "train" / "disc" / "0.png")
    with pytest.raises(ValueError, match=r"expected runs of the data and weights .* had the fingerprint .*, now ") as e:
        require_same_sources([cell], place / "cells", Sources())
    assert f"({cell.path(place / 'cells').name})" in str(e.value)
    assert "backbone" not in str(e.value)
    assert missing_cells([cell], place / "cells") == []  # the result is still there


def test_other_weights_are_refused(kept: tuple[Cell, Path]) -> None:
    cell, place = kept
    path = place / "weights.safetensors"
    save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"backbone vit_offline_patch8_32 from .*/weights.safetensors had the sha256"):
        require_same_sources([cell], place / "cells", Sources())
    path.unlink()
    told: list[str] = []
    require_same_sources([cell], place / "cells", Sources(), told.append)
    assert "is not compared with that of the runs that are done: " in told[-1]


def test_data_are_opened_once_for_what_decides_them() -> None:
    lists, drawn = (Settings(model="vit_offline_patch8_32", data=data) for data in ("vtab:cifar", "offline:digits"))
    sources = Sources()
    with mock.patch("mosa_kernels.train.table_sources.open_splits") as opened:
        for settings, noise in ((lists, 0.0), (lists, 0.4), (drawn, 0.0)):
            opened.reset_mock()
            for seed, workers in ((0, 0), (1, 0), (1, 2)):
                sources.fingerprint(dataclasses.replace(settings, data_seed=seed, label_noise=noise, workers=workers))
            assert opened.call_count == (1 if settings == lists and not noise else 2)


def moved(cell: Cell, place: Path) -> Cell:
    """The same run, after its data and weights were moved."""
    (place / "elsewhere").mkdir()
    for name in ("data", "weights.safetensors"):
        shutil.move(place / name, place / "elsewhere" / name)
    there = {
        "data": str(place / "elsewhere" / "data"),
        "checkpoint": str(place / "elsewhere" / "weights.safetensors"),
    }
    return dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, **there))


def test_runs_are_found_where_data_and_weights_were_moved(kept: tuple[Cell, Path]) -> None:
    cell, place = kept
    folder = place / "cells"
    assert same_elsewhere([cell], folder, Sources()) == {}  # it is done
    now = moved(cell, place)
    assert missing_cells([now], folder) == [now]
    assert same_elsewhere([now], folder, Sources()) == {now.path(folder): cell.path(folder)}
    seed = dataclasses.replace(now.settings, recipe=dataclasses.replace(now.settings.recipe, seed=1))
    others = [dataclasses.replace(now, settings=seed), dataclasses.replace(now, test=False)]
    assert same_elsewhere(others, folder, Sources()) == {}
    assert same_elsewhere([now], place / "nothing", Sources()) == {}
    (folder / "not-of-this-version.json").write_text('{"settings": {"depth": 3}}')
    assert len(same_elsewhere([now], folder, Sources())) == 1


@pytest.mark.parametrize("what", ["data", "weights"])
def test_runs_of_other_data_or_weights_elsewhere_are_not_taken(what: str, kept: tuple[Cell, Path]) -> None:
    cell, place = kept
    now = moved(cell, place)
    if what == "data":
        Image.new("RGB", (32, 32)).save(place / "elsewhere" / "data" / "train" / "disc" / "0.png")
    else:
        path = place / "elsewhere" / "weights.safetensors"
        save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path)
    assert same_elsewhere([now], place / "cells", Sources()) == {}
