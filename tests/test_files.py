"""Files that are complete, or as they were, and the same bytes for the same tensors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mosa_kernels._files import left_partial, write_whole
from mosa_kernels._weights import write_tensors


def test_a_file_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    before = os.umask(0o027)
    try:
        for text in ("first", "second"):
            write_whole(path, lambda partial, text=text: partial.write_text(text))
            assert path.read_text() == text
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert list(path.parent.iterdir()) == [path]


def test_other_threads_make_files_of_their_usual_rights_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError(f"the mask is the whole process's, and was set to {mask:o}")

    (tmp_path / "usual").touch()
    monkeypatch.setattr(os, "umask", refuse)
    write_tensors(tmp_path / "file.safetensors", {"tensor": torch.ones(2)}, {"format": "pt"})
    assert (tmp_path / "file.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("before")

    def fail(partial: Path) -> None:
        partial.write_text("half of")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def write(partial: Path) -> None:
        partial.write_text("outer")
        write_whole(path, lambda other: other.write_text("inner"))
        assert path.read_text() == "inner"

    write_whole(path, write)
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path, text = tmp_path / "file.md", "75.5 ± 1.1 %"
    code = f"from mosa_kernels.train.folder import *; write_text(Path({str(path)!r}), {text!a})"
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **locale}, check=True)
    assert path.read_text(encoding="utf-8") == text


def test_what_a_killed_writer_left_is_known(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    (tmp_path / ".file.txt.backup").write_text("another's")

    def look(partial: Path) -> None:
        assert left_partial(path) == [partial]
        assert left_partial(tmp_path / "file") == left_partial(tmp_path / "nowhere" / "file.txt") == []

    write_whole(path, look)
    assert left_partial(path) == []


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*file\.txt'$"):
        write_whole(tmp_path / "file.txt", fill)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.tensor([True]), "é": torch.randn(5).bfloat16()}
    metadata = {name: json.dumps({"ü": '"\\\n\t\x01'}, ensure_ascii=name < "d") for name in "hagfbedc"}
    for number in range(8):
        write_tensors(tmp_path / f"{number}.safetensors", tensors, metadata)
    (written,) = {path.read_bytes() for path in tmp_path.iterdir()}
    assert written.index(b'"a":') < written.index(b'"h":')
    with safe_open(tmp_path / "0.safetensors", framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
