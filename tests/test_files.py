"""Files that are complete, or as they were."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mosa_kernels._files import write_whole


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


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def fill(partial: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: .*file\.txt'$"):
        write_whole(tmp_path / "file.txt", fill)
