"""Image folders in every shape people have, and an error that names what is wrong for every way to get it wrong."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosa_kernels.data import DataSplits, open_data
from mosa_kernels.data.folders import open_folder


def write(folder: Path, counts: dict[str, int], mode: str = "RGB", start: int = 0) -> Path:
    """Small images whose grey value is their number, so that every file is another picture."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            Image.new(mode, (9, 7), number if mode == "L" else (number, 5, 9)).save(folder / name / f"{number}.png")
    return folder


def label_counts(dataset: object) -> Counter[int]:
    return Counter(dataset[i][1] for i in range(len(dataset)))  # type: ignore[index, arg-type]


def pictures(splits: DataSplits) -> list[set[tuple[int, int]]]:
    """(label, red value of the first pixel) of every image, split by split: with `write`, one a file."""
    return [
        {(d[i][1], np.asarray(d[i][0])[0, 0, 0]) for i in range(len(d))}
        for d in (splits.train, splits.validation, splits.test)
    ]


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_three_folders(tmp_path: Path, validation: str) -> None:
    write(tmp_path / "train", {"cat": 5, "dog": 3})
    write(tmp_path / validation, {"cat": 2, "dog": 1})
    write(tmp_path / "test", {"cat": 1, "dog": 4}, mode="L")
    splits = open_data(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert [label_counts(d) for d in (splits.train, splits.validation, splits.test)] == [
        {0: 5, 1: 3},
        {0: 2, 1: 1},
        {0: 1, 1: 4},
    ]
    image, label = splits.test[4]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, label) == ("RGB", (9, 7), 1)
    assert "16 .png" in splits.note
    assert "its own train, validation and test folders" in splits.note
    assert splits.name == f"folder:{tmp_path.name}"


def test_a_missing_validation_set_is_held_out_by_class_and_said(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 40, "b": 10, "c": 2})
    write(tmp_path / "test", {"a": 3, "b": 3, "c": 3}, start=100)
    splits = open_folder(tmp_path, seed=1)
    assert label_counts(splits.validation) == {0: 4, 1: 1, 2: 1}
    train, validation, test = pictures(splits)
    assert not train & validation
    assert len(train | validation) == 52
    assert len(test) == 9
    assert "validation is 0.1 of train/, held out with seed 1" in splits.note
    again, other = open_folder(tmp_path, seed=1), open_folder(tmp_path, seed=2)
    assert pictures(again) == [train, validation, test]
    assert again.fingerprint == splits.fingerprint
    assert pictures(other)[1] != validation
    assert other.fingerprint != splits.fingerprint


def test_a_validation_folder_without_test_becomes_the_test_set_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 10, "b": 10})
    write(tmp_path / "val", {"a": 3, "b": 3}, start=100)
    splits = open_folder(tmp_path)
    assert splits.note.count("val/ is the test set") == 1
    assert {red for _, red in pictures(splits)[2]} == {100, 101, 102}
    assert len(splits.train) == 18


def test_a_flat_folder_is_split_by_class(tmp_path: Path) -> None:
    write(tmp_path, {"a": 30, "b": 3})
    (tmp_path / ".cache").mkdir()
    splits = open_folder(tmp_path, seed=3)
    parts = pictures(splits)
    assert [len(part) for part in parts] == [22, 4, 7]
    assert len(set.union(*parts)) == 33
    assert label_counts(splits.train) == {0: 21, 1: 1}
    assert "split by class with seed 3" in splits.note


def test_nested_images_and_other_files(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "deep", {"er": 4})
    write(tmp_path / "train", {"b": 4})
    write(tmp_path / "test", {"a": 1, "b": 1})
    (tmp_path / "train" / "b" / "notes.txt").write_text("not an image")
    splits = open_folder(tmp_path)
    assert len(splits.train) + len(splits.validation) == 8


def test_the_sets_may_be_written_in_any_case(tmp_path: Path) -> None:
    for name, count in (("Train", 5), ("VAL", 2), ("Test", 3)):
        write(tmp_path / name, {"a": count, "b": count})
    splits = open_folder(tmp_path)
    assert splits.classes == ("a", "b")
    assert [len(d) for d in (splits.train, splits.validation, splits.test)] == [10, 4, 6]


def test_sets_are_not_taken_for_classes(tmp_path: Path) -> None:
    write(tmp_path, {"Dev": 5, "trainval": 5})
    with pytest.raises(ValueError, match=r"expected classes, got folders that look like sets: Dev, trainval; give"):
        open_folder(tmp_path)


def test_one_class_is_none(tmp_path: Path) -> None:
    """Everybody would have all of it right: the data lie a folder deeper, or without folders of classes."""
    write(tmp_path / "high" / "pets" / "train", {"a": 5, "b": 5})
    write(tmp_path / "high" / "pets" / "test", {"a": 5, "b": 5}, start=100)
    with pytest.raises(ValueError, match=r"high: expected at least 2 classes, .* got pets alone"):
        open_folder(tmp_path / "high")
    for name in ("train", "test"):
        write(tmp_path / "bare" / name, {"images": 5}, start=len(name))
    with pytest.raises(ValueError, match=r"bare/train: expected at least 2 classes, .* got images alone"):
        open_folder(tmp_path / "bare")


def test_hidden_folders_are_left_out_and_links_followed(tmp_path: Path) -> None:
    write(tmp_path / "data", {"a": 5, "b": 5, "b/.ipynb_checkpoints": 1})
    write(tmp_path / "elsewhere", {"more": 4}, start=100)
    folder = tmp_path / "data"
    (folder / "b" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "again").symlink_to(tmp_path / "elsewhere" / "more")  # entered once
    (folder / "a" / "loop").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(folder)  # would make a's of b's
    splits = open_folder(folder)
    assert label_counts(splits.train) + label_counts(splits.validation) + label_counts(splits.test) == {0: 5, 1: 9}
    (folder / "a" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"data: 1 of 15 images that it lists are missing: .*lost\.png"):
        open_folder(folder)


def test_a_test_folder_that_leads_to_train_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 5, "b": 5})
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match=r"10 images are in both the train and the test set: .*/train/a/0\.png"):
        open_folder(tmp_path)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_file_is_in_one_part_of_what_is_split(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    """With test/ the training images are split, without train/ all of them."""
    write(tmp_path / "sets" / "train", {"a": 5, "b": 5})
    write(tmp_path / "sets" / "test", {"a": 2, "b": 2}, start=100)
    write(tmp_path / "flat", {"a": 5, "b": 5})
    for folder in (tmp_path / "sets" / "train", tmp_path / "flat"):
        open_folder(tmp_path / folder.relative_to(tmp_path).parts[0])
        link(folder / "b" / "copy3.png", folder / "b" / "3.png")
    named = r"expected each image once, as they are split, got 1 under two names: .*/b/3\.png and .*/b/copy3\.png"
    for name in ("sets", "flat"):
        with pytest.raises(ValueError, match=named):
            open_folder(tmp_path / name)
    write(tmp_path / "sets" / "val", {"a": 2, "b": 2}, start=200)
    assert len(open_folder(tmp_path / "sets").train) == 11  # seen more often, and nowhere else


def test_a_file_has_one_label(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        write(tmp_path / name, {"a": 3}, start=100 * number)
        (tmp_path / name / "b").symlink_to(tmp_path / name / "a")
    named = r"train: expected each image in one class, got 3 under two names: .*/a/0\.png and .*/b/0\.png"
    with pytest.raises(ValueError, match=named):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"expected each image once, .* got 3 under two names: .*/a/0\.png and .*/b/0"):
        open_folder(tmp_path / "train")


def test_a_hard_link_is_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 5, "b": 5})
    write(tmp_path / "test", {"a": 2, "b": 2}, start=100)
    (tmp_path / "test" / "a" / "other.png").hardlink_to(tmp_path / "train" / "a" / "4.png")
    with pytest.raises(ValueError, match=r"1 images are in both the train and the test set: .*/train/a/4\.png"):
        open_folder(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that takes any bytes as a name")
@pytest.mark.parametrize("name", [b"caf\xe9/0.png", b"a/caf\xe9.png"])
def test_a_name_that_is_not_utf_8_is_named(tmp_path: Path, name: bytes) -> None:
    write(tmp_path, {"a": 5, "b": 5})
    image = tmp_path / os.fsdecode(name)
    image.parent.mkdir(exist_ok=True)
    for number in range(3):  # as many as a class needs
        write(tmp_path, {"b": 1}, start=100 + number)
        (tmp_path / "b" / f"{100 + number}.png").rename(image.with_stem(f"{image.stem}{number}"))
    with pytest.raises(ValueError, match=r"expected names of files and folders in UTF-8, got '.*caf\\udce9") as caught:
        open_folder(tmp_path)
    str(caught.value).encode()
    with pytest.raises(ValueError, match=r"data: expected a name or a path in UTF-8, got '.*caf\\udce9") as caught:
        open_data(image.parent.parent / os.fsdecode(b"caf\xe9"))
    str(caught.value).encode()


def test_the_fingerprint_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / str(number) / "train", {"a": 5, "b": 5})
        write(tmp_path / str(number) / "test", {"a": 5, "b": 5})
    (tmp_path / "1" / "train" / "a" / "4.png").rename(tmp_path / "1" / "train" / "b" / "5.png")
    prints = [open_folder(tmp_path / str(number)).fingerprint for number in range(3)]
    assert prints[0] == prints[2] != prints[1]


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected one subfolder a class, found none"):
        open_folder(tmp_path / "empty")

    only_train = tmp_path / "only_train"
    write(only_train / "train", {"a": 3})
    with pytest.raises(ValueError, match=r"found train/ but neither test/ nor val/"):
        open_folder(only_train)
    only_test = tmp_path / "only_test"
    write(only_test / "test", {"a": 3})
    with pytest.raises(ValueError, match=r"found test/ but no train/ folder"):
        open_folder(only_test)

    differ = tmp_path / "differ"
    write(differ / "train", {"cat": 3, "dog": 3})
    write(differ / "val", {"cat": 1, "dog": 1})
    write(differ / "test", {"cat": 1, "fox": 1})
    with pytest.raises(ValueError, match=r"train and test differ \(only in test: fox; only in train: dog\)"):
        open_folder(differ)

    twice = tmp_path / "twice"
    for name in ("train", "val", "valid", "test"):
        write(twice / name, {"a": 3})
    with pytest.raises(ValueError, match=r"val/ and valid/ both look like the validation set"):
        open_folder(twice)

    hollow = tmp_path / "hollow"
    write(hollow / "train", {"a": 3, "b": 3})
    write(hollow / "test", {"a": 3})
    (hollow / "test" / "b").mkdir()
    with pytest.raises(ValueError, match=r"test: no images .* in the class folders b"):
        open_folder(hollow)

    scarce = tmp_path / "scarce"
    write(scarce, {"a": 10, "b": 2})
    with pytest.raises(ValueError, match=r"at least 3 images of every class; too few: b \(2\)"):
        open_folder(scarce)
    with pytest.raises(ValueError, match=r"shares to hold out: expected positive numbers of sum below 1, got"):
        open_folder(scarce, validation_share=0.5, test_share=0.5)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train", {"a": 4, "b": 4})
    write(tmp_path / "test", {"a": 2, "b": 2})
    (tmp_path / "test" / "b" / "broken.jpg").write_bytes(b"these are not the bytes of an image")
    whole = (tmp_path / "test" / "a" / "0.png").read_bytes()
    (tmp_path / "test" / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    splits = open_folder(tmp_path)
    for index in (2, 5):
        with pytest.raises(ValueError, match=r"cannot read the image .*(cut\.png|broken\.jpg)"):
            splits.test[index]
    with pytest.raises(ValueError, match=r"2 unreadable images: .*cut\.png.*broken\.jpg"):
        open_folder(tmp_path, verify=True)
    (tmp_path / "train" / "a" / "nothing.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty image files: .*nothing\.png"):
        open_folder(tmp_path)
