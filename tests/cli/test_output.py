"""Outputs that cannot be written are refused before any work."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosa_kernels.cli import demo as demo_module
from mosa_kernels.train import saved
from mosa_kernels.train.folder import require_writable

WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "--data", "offline:digits"),
    "merge": ("merge", "RUN"),
    "evaluate": ("evaluate", "RUN"),
    "tsne": ("tsne", "RUN"),
    "demo": ("demo", "--quick"),
    "table": ("table", "3", "--quick"),
}
FILES = {"merge": "x.safetensors", "tsne": "x.png"}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are not even built."""
    for module, name in ((saved, "create_backbone"), (demo_module, "demo_splits")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was done"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WORDS)
def test_a_file_in_the_way_is_named(name: str, trained: tuple[Path, str], command: Any, tmp_path: Path):
    (tmp_path / "notes").write_text("mine")
    output = tmp_path / "notes" / "new" / FILES.get(name, "x")
    words = (trained[0] if word == "RUN" else word for word in WORDS[name])
    result = command(*words, "--output", output)
    assert result.exit_code == 1
    assert result.stderr == f"error: output {output}: it cannot be made, for {tmp_path / 'notes'} is a file\n"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WORDS)
def test_folders_and_files_are_not_taken_for_each_other(
    name: str, trained: tuple[Path, str], command: Any, tmp_path: Path
):
    output = tmp_path / FILES.get(name, "x")
    folder = name in ("train", "demo", "table")
    output.write_text("mine") if folder else output.mkdir()
    result = command(*(trained[0] if word == "RUN" else word for word in WORDS[name]), "--output", output)
    assert result.exit_code == 1
    wanted, found = ("folder", "file") if folder else ("file", "folder")
    assert result.stderr == f"error: output: expected a {wanted}, {output} is a {found}\n"


def test_permissions_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for folder in (False, True):
        require_writable(tmp_path / "a" / "b", folder=folder)
        require_writable(Path("x"), folder=folder)
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)
    for folder in (False, True):
        with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
            require_writable(tmp_path / "a" / "b", folder=folder)
    with pytest.raises(ValueError, match=f"no permission to write in {tmp_path}"):
        require_writable(tmp_path, folder=True)


@pytest.mark.parametrize("name", ["config", "adapter/best/adapter_model"])
def test_merging_does_not_overwrite_the_run(name: str, trained: tuple[Path, str], command: Any, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = command("merge", run, "--output", run / f"{name}.safetensors")
    assert result.exit_code == 1
    assert "is there and is not a merged model; choose another name" in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    for _ in range(2):  # an earlier merge may be written again
        assert command("merge", run, "--output", run / "merged.safetensors").exit_code == 0


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("evaluate", "--cpu"), "config.json"),
        (("evaluate", "--cpu"), "result.json"),
        (("tsne",), "config.png"),
        (("tsne",), "curve.png"),
    ],
)
def test_figures_do_not_overwrite_the_run(
    words: tuple[str, ...], name: str, trained: tuple[Path, str], command: Any, tmp_path: Path
):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = command(words[0], run, *words[1:], "--output", run / name)
    assert result.exit_code == 1
    assert "is there and is not a" in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("demo", "--quick"), "demo.json"),
        (("demo", "--quick"), "demo.md"),
        (("bench", "--preset", "smoke"), "report.json"),
        (("bench", "--preset", "smoke"), "report.md"),
        (("bench", "--preset", "smoke"), "report.unfinished.json"),
        (("bench", "--preset", "smoke"), "growth.png"),
    ],
)
def test_folders_of_others_are_left_alone(words: tuple[str, ...], name: str, command: Any, tmp_path: Path):
    (tmp_path / name).write_text('{"mine": 1}')
    result = command(*words, "--output", tmp_path)
    assert result.exit_code == 1
    assert f"error: output: {tmp_path / name} is there and is not a" in result.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"mine": 1}']


def test_a_machine_without_that_much_memory_is_said(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_module, "demo_splits", lambda _: torch.empty(2**60))
    result = command("demo", "--quick", "--output", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: out of memory: ")
    assert len(result.stderr.splitlines()) == 1


def test_figures_of_evaluate_may_be_written_again(trained: tuple[Path, str], command: Any, tmp_path: Path):
    for _ in range(2):
        assert command("evaluate", trained[0], "--cpu", "--output", tmp_path / "figures.json").exit_code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of file sizes")
@pytest.mark.parametrize("name", ["merged.safetensors", "merged.pt2"])
def test_a_full_disk_is_one_line(name: str, trained: tuple[Path, str], command: Any, tmp_path: Path):
    """Stood in for by a limit on the size of files, which writing runs into in the same way."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        result = command("merge", trained[0], "--output", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    assert "File too large" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("words", [("evaluate", "RUN"), ("train", "--resume", "--output", "RUN")])
def test_a_config_of_something_else_is_named(words: tuple[str, ...], command: Any, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"settings": {}}')
    result = command(*(tmp_path if word == "RUN" else word for word in words))
    assert result.exit_code == 1
    assert "config.json: expected the record of a run, it has no data, backbone, versions" in result.stderr
