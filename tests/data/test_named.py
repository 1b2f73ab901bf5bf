"""Data sets by name, on small stand-ins written in the formats that torchvision and timm read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torchvision import datasets
from typer.testing import CliRunner

from mosa_kernels.cli.main import app
from mosa_kernels.data import open_data
from mosa_kernels.data.wrapped import RGBDataset, labels_of


def write_cifar(root: Path) -> None:
    """CIFAR-10's files with 20 images a batch (torchvision checks their hashes, which the test switches off)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {
            "data": generator.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"kind {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def write_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 300), ("test", 100)):
        labels = [i % 100 for i in range(count)]
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind {i}" for i in range(100)]}))


def write_aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    (folder / "images").mkdir(parents=True)
    variants = ["707-320", "A310"]
    (folder / "variants.txt").write_text("\n".join(variants))
    number = 0
    for split, count in (("train", 4), ("val", 2), ("test", 6)):
        lines = []
        for _ in range(count):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "images" / f"{number:07d}.jpg")
            lines.append(f"{number:07d} {variants[number % 2]}")
            number += 1
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines))


def write_food(root: Path) -> None:
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split, numbers in (("train", range(20)), ("test", range(20, 25))):
        listed: dict[str, list[str]] = {name: [f"{name}/{number}" for number in numbers] for name in ("pho", "pizza")}
        (folder / "meta" / f"{split}.json").write_text(json.dumps(listed))
        for paths in listed.values():
            for path in paths:
                (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 6)).save(folder / "images" / f"{path}.jpg")


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value, 0, 0)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "sizes", "first_difference"),
    [
        ("CIFAR100", write_cifar100, (200, 100, 100), "200 training images instead of 50,000"),
        ("FGVCAircraft", write_aircraft, (4, 2, 6), "2 classes instead of 100"),
        ("Food101", write_food, (36, 4, 10), "2 classes instead of 101"),
    ],
)
def test_the_general_data_sets_are_compared_with_table_11(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], None],
    sizes: tuple[int, int, int],
    first_difference: str,
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write(tmp_path)
    splits = open_data(f"torchvision:{name}", root=tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert splits.benchmark == "GICD"
    assert splits.differs[0] == first_difference
    # The final run trains on every image that is not a test image.
    final = open_data(f"torchvision-all:{name}", root=tmp_path)
    assert (len(final.train), len(final.validation), len(final.test)) == (sizes[0] + sizes[1], *sizes[1:])
    assert final.validation_in_train
    assert final.fingerprint != splits.fingerprint
    held = [(np.asarray(image).tobytes(), label) for image, label in (final.validation[i] for i in range(sizes[1]))]
    trained = {(np.asarray(final.train[i][0]).tobytes(), final.train[i][1]) for i in range(len(final.train))}
    assert set(held) <= trained
    assert not any(each.startswith(f"{sizes[1]} validation images") for each in final.differs)
    with pytest.raises(IndexError):
        final.train[len(final.train)]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


@pytest.mark.parametrize("name", ["torchvision:CIFAR10", "timm:torch/cifar10"])
def test_a_train_and_a_test_set(cifar: Path, name: str) -> None:
    splits = open_data(name, root=cifar, seed=1, validation_share=0.2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (80, 20, 20)
    assert splits.num_classes == 10
    assert splits.classes[3] == "kind 3"
    image, label = splits.test[13]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size, label) == ("RGB", (32, 32), 3)
    train, validation, test = (
        {np.asarray(d[i][0]).tobytes() for i in range(len(d))} for d in (splits.train, splits.validation, splits.test)
    )
    assert len(train | validation | test) == 120
    assert "validation (0.2) held out of its training set with seed 1" in splits.note


def test_named_splits_are_taken_as_asked(cifar: Path) -> None:
    splits = open_data("timm:torch/cifar10", root=cifar, split_names={"validation": "test", "test": "test"})
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (100, 20, 20)
    assert "its own train, validation and test sets" in splits.note


def test_a_data_set_without_splits_is_divided() -> None:
    splits = open_data("torchvision:FakeData", seed=2)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == pytest.approx((700, 100, 200), abs=10)
    with pytest.raises(
        ValueError, match="root: expected None for torchvision:FakeData, which has no files, got /there"
    ):
        open_data("torchvision:FakeData", root="/there")


@pytest.mark.parametrize("name", ["timm:torch/cifar10", "torchvision:CIFAR10"])
def test_split_names_that_change_nothing_are_refused(cifar: Path, name: str) -> None:
    with pytest.raises(ValueError, match="split_names: expected some of train, validation, test, got val"):
        open_data(name, root=cifar, split_names={"val": "test"})
    if name.startswith("torchvision"):
        with pytest.raises(ValueError, match="split_names: expected None for torchvision:CIFAR10, whose sets have no"):
            open_data(name, root=cifar, split_names={"validation": "test"})


def test_usual_split_names_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Flowers(datasets.VisionDataset):
        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            asked.append(split)
            if split not in ("train", "val", "test"):
                raise ValueError(f"unknown split {split}")
            self._labels = [0, 1, 2] * {"train": 3, "val": 2, "test": 4}[split]

        def __len__(self) -> int:
            return len(self._labels)

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (4, 4)), self._labels[index]

    monkeypatch.setattr(datasets, "Flowers102", Flowers)
    splits = open_data("torchvision:Flowers102", root="somewhere")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 6, 12)
    assert splits.train[0][0] is not None
    swapped = open_data("torchvision:Flowers102", root="somewhere", split_names={"train": "test", "test": "train"})
    assert (len(swapped.train), len(swapped.test)) == (12, 9)
    with pytest.raises(ValueError, match="unknown split exam"):
        open_data("torchvision:Flowers102", root="somewhere", split_names={"test": "exam"})


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torchvision has no data set 'Cifar100'; did you mean 'CIFAR100'\?"):
        open_data("torchvision:Cifar100", root=tmp_path)
    with pytest.raises(ValueError, match=r"torchvision has no data set 'folder'"):
        open_data("torchvision:folder", root=tmp_path)
    with pytest.raises(ValueError, match=r"root: expected the folder of torchvision:CIFAR10 \(--data-root\), got None"):
        open_data("torchvision:CIFAR10")
    for name in ("torchvision:CIFAR10", "timm:torch/cifar10"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name} in .*: .* \(download=True, .*, fetches what can be fetched"
        ):
            open_data(name, root=tmp_path)
    with pytest.raises(ValueError, match=r"timm:torch/nonsense"):
        open_data("timm:torch/nonsense", root=tmp_path)


@pytest.mark.parametrize("name", ["folder", "", "nope/x", "imagenet/xyz", "torch/folder", "Torch/image_folder"])
def test_what_timm_reads_as_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    for kind in ("a", "b"):
        picture(tmp_path / "train" / kind / "0.png", 0)
    with pytest.raises((ValueError, FileNotFoundError), match=r"expected .*a folder of images"):
        open_data(f"timm:{name}", root=tmp_path)
    with pytest.raises(ValueError, match=r"timm:wds/x is an iterable data set; only those with a length"):
        open_data("timm:wds/x", root=tmp_path)


def test_sets_of_another_library_must_not_share_files(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    meta = tmp_path / "fgvc-aircraft-2013b" / "data"
    lists = [(meta / f"images_variant_{split}.txt").read_text() for split in ("train", "val")]
    (meta / "images_variant_trainval.txt").write_text("\n".join(lists))
    with pytest.raises(ValueError, match=r"2 images are in both the train and the validation set: .*0000004\.jpg"):
        open_data("torchvision:FGVCAircraft", root=tmp_path, split_names={"train": "trainval"})
    one = {"validation": "test", "test": "test"}  # said on purpose
    assert len(open_data("torchvision:FGVCAircraft", root=tmp_path, split_names=one).validation) == 6


def test_files_of_another_library_are_there_and_in_the_fingerprint(tmp_path: Path) -> None:
    write_food(tmp_path)
    image = tmp_path / "food-101" / "images" / "pizza" / "7.jpg"
    whole, before = image.read_bytes(), open_data("torchvision:Food101", root=tmp_path).fingerprint
    shutil.copytree(tmp_path / "food-101", tmp_path / "copy" / "food-101")
    assert open_data("torchvision:Food101", root=tmp_path / "copy").fingerprint == before
    image.write_bytes(whole[: len(whole) // 2])
    assert open_data("torchvision:Food101", root=tmp_path).fingerprint != before
    with pytest.raises(
        ValueError, match=r"Food101: 1 unreadable images: .*: item 27 \(.*cannot read the image .*7\.jpg"
    ):
        open_data("torchvision:Food101", root=tmp_path, verify=True)
    image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"torchvision:Food101, train: empty image files: .*7\.jpg"):
        open_data("torchvision:Food101", root=tmp_path)
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"torchvision:Food101, train: 1 of 40 images .* missing: .*7\.jpg"):
        open_data("torchvision:Food101", root=tmp_path)


def test_check_data_decodes_another_librarys_images(tmp_path: Path) -> None:
    write_aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "0000001.jpg").write_bytes(b"no image")
    asked = ["check-data", "torchvision:FGVCAircraft", "--data-root", str(tmp_path)]
    assert "unreadable" not in CliRunner().invoke(app, asked).output
    assert (
        "1 unreadable images: torchvision:FGVCAircraft: item 1" in CliRunner().invoke(app, [*asked, "--decode"]).output
    )


def test_sets_are_not_taken_for_torchvisions_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        picture(tmp_path / split / "a" / "0.png", 0)
    with pytest.raises(ValueError, match=r"torchvision:ImageFolder: expected classes, got folders that look like sets"):
        open_data("torchvision:ImageFolder", root=tmp_path)


def test_one_class_of_torchvisions_is_none(tmp_path: Path) -> None:
    picture(tmp_path / "pets" / "train" / "0.png", 0)
    with pytest.raises(ValueError, match=r"torchvision:ImageFolder: expected at least 2 classes, .* got pets alone"):
        open_data("torchvision:ImageFolder", root=tmp_path)


def test_what_is_split_holds_each_file_of_torchvisions_once(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        for number in range(3):
            picture(tmp_path / kind / f"{number}.png", number)
    assert len(open_data("torchvision:ImageFolder", root=tmp_path).test) == 2
    (tmp_path / "c").symlink_to(tmp_path / "b")
    named = r"ImageFolder, train: expected each image once, .* got 3 under two names: .*/b/0\.png and .*/c/0\.png"
    with pytest.raises(ValueError, match=named):
        open_data("torchvision:ImageFolder", root=tmp_path)


def test_labels_without_names_are_those_of_several_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_labels(*labels: int) -> None:
        class Stand(datasets.VisionDataset):
            def __init__(self) -> None:
                self.targets = list(labels)

            def __len__(self) -> int:
                return len(self.targets)

        monkeypatch.setattr(datasets, "FakeData", Stand)
        open_data("torchvision:FakeData")

    with pytest.raises(ValueError, match=r"torchvision:FakeData: expected at least 2 classes, got 0 alone"):
        open_labels(0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"FakeData: expected labels from 0 without gaps, got 1700000000 as one of 4"):
        open_labels(0, 1, 2, 1_700_000_000)


def test_16_bits_of_another_librarys_image_are_not_white(tmp_path: Path) -> None:
    for kind in ("a", "b"):
        for number in range(3):
            path = tmp_path / kind / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((4, 4), 0x7F00, np.uint16)).save(path)
    image, _ = open_data("torchvision:ImageFolder", root=tmp_path).train[0]
    assert np.unique(np.asarray(image)).tolist() == [0x7F]
    assert np.unique(np.asarray(RGBDataset(ImageDataset(str(tmp_path)), "timm's")[0][0])).tolist() == [0x7F]


def test_timms_next_item_does_not_stand_in_for_a_broken_one(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "0.png", 0)
    picture(tmp_path / "b" / "0.png", 1)
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    dataset = RGBDataset(ImageDataset(str(tmp_path)), "timm's")
    assert dataset[1][1] == 1
    with pytest.raises(ValueError, match=r"timm's: item 0: cannot read the image: cannot identify"):
        dataset[0]


def test_only_one_integer_an_image_is_a_label() -> None:
    detection = RGBDataset([(Image.new("RGB", (4, 4)), {"boxes": []})], "boxes")
    with pytest.raises(ValueError, match=r"boxes: item 0 has a label of type dict; only classification"):
        labels_of(detection)
    arrays = RGBDataset([(np.zeros((4, 4, 3)), 0)], "arrays")
    with pytest.raises(ValueError, match=r"arrays: item 0: expected a PIL image, got ndarray"):
        arrays[0]


@pytest.mark.parametrize("kept_as", ["targets", "_labels", "samples", "hub", "nothing"])
def test_labels_are_read_from_lists_without_reading_images(kept_as: str) -> None:
    labels = [2, 0, 1]
    dataset = CountingDataset(labels)
    if kept_as in ("targets", "_labels"):
        setattr(dataset, kept_as, torch.tensor(labels))
    elif kept_as == "samples":
        dataset.samples = [(f"{label}.png", label) for label in labels]
    elif kept_as == "hub":
        dataset.reader = SimpleNamespace(label_key="label", dataset={"label": labels})
    assert labels_of(RGBDataset(dataset, "counting")).tolist() == labels
    assert dataset.reads == (3 if kept_as == "nothing" else 0)


class CountingDataset:
    """Counts how often an image is read."""

    def __init__(self, labels: list[int]) -> None:
        self._answers = labels
        self.reads = 0
        self.samples: object = None
        self.reader: object = None

    def __len__(self) -> int:
        return len(self._answers)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads += 1
        return Image.new("RGB", (2, 2)), self._answers[index]
