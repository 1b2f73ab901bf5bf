"""Loaders repeat themselves: by seed, after a resume, with workers, under accelerate; and disturb nobody's draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mosa_kernels.data import ArrayDataset, DataSplits, Loaders, make_loaders, open_data, set_epoch
from mosa_kernels.data.transforms import evaluation_config

CONFIG = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bilinear"}
Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def memory() -> DataSplits:
    generator = np.random.default_rng(0)
    parts = [
        ArrayDataset(generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 5) for n in (50, 20, 30)
    ]
    return DataSplits("memory", *parts, classes=tuple("abcde"), fingerprint="", note="")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    root = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 5)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return open_data(root)


def passes(loaders: Loaders, epochs: range) -> list[Batches]:
    shown = []
    for epoch in epochs:
        set_epoch(loaders.train, epoch)
        shown.append(list(loaders.train))
    return shown


def assert_same(one: list[Batches], other: list[Batches]) -> None:
    assert [len(batches) for batches in one] == [len(batches) for batches in other]
    for batches, twins in zip(one, other, strict=True):
        for (images, labels), (twin_images, twin_labels) in zip(batches, twins, strict=True):
            assert torch.equal(images, twin_images)
            assert torch.equal(labels, twin_labels)


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("augment", ["light", "paper", "official"])
def test_a_resumed_run_sees_the_same_batches(kind: str, augment: Any, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind)
    whole = passes(make_loaders(splits, CONFIG, 8, seed=3, augment=augment), range(4))
    resumed = passes(make_loaders(splits, CONFIG, 8, seed=3, augment=augment), range(2, 4))
    assert_same(whole[2:], resumed)
    other = passes(make_loaders(splits, CONFIG, 8, seed=4, augment=augment), range(1))
    for different in (whole[1], other[0]):
        assert not torch.equal(whole[0][0][0], different[0][0])


def test_every_epoch_shows_every_image_once_in_another_order(memory: DataSplits) -> None:
    shown = passes(make_loaders(memory, CONFIG, 8, augment="none"), range(3))
    keys = [[image.numpy().tobytes() for images, _ in batches for image in images] for batches in shown]
    assert all(len(set(order)) == 50 for order in keys)
    assert set(keys[0]) == set(keys[1]) == set(keys[2])
    assert len({tuple(order) for order in keys}) == 3
    assert [len(labels) for _, labels in shown[0]] == [8] * 6 + [2]


def test_labels_stay_with_their_images(memory: DataSplits) -> None:
    assert isinstance(memory.train, ArrayDataset)
    loaders = make_loaders(memory, CONFIG, 16, augment="none")
    for images, labels in loaders.train:
        pixels = ((images * 0.25 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for image, label in zip(pixels, labels.tolist(), strict=True):
            number = np.flatnonzero((memory.train.images == image).all(axis=(1, 2, 3)))
            assert memory.train.labels[number].tolist() == [label]


def test_workers_change_nothing(files: DataSplits) -> None:
    alone = passes(make_loaders(files, CONFIG, 5, seed=1, augment="paper"), range(3))
    helped = passes(make_loaders(files, CONFIG, 5, workers=2, seed=1, augment="paper"), range(3))
    assert_same(alone, helped)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_other_random_numbers_are_left_alone(kind: str, request: pytest.FixtureRequest) -> None:
    loaders = make_loaders(request.getfixturevalue(kind), CONFIG, 8, augment="paper")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in loaders.train, loaders.test:
        next(iter(loaders.train))
    assert torch.equal(torch.rand(3), expected)


def test_accelerate_keeps_epochs_apart_and_resumes(memory: DataSplits) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = passes(make_loaders(memory, CONFIG, 8, augment="light"), range(4))
    prepared = accelerator.prepare(make_loaders(memory, CONFIG, 8, augment="light").train)
    for epoch in (0, 1, 3, 2, 2):
        set_epoch(prepared, epoch)
        assert_same([plain[epoch]], [list(prepared)])


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_evaluation_is_in_order_and_the_same_every_time(kind: str, request: pytest.FixtureRequest) -> None:
    splits = request.getfixturevalue(kind)
    loaders = make_loaders(splits, CONFIG, 4, augment="light", evaluation_batch_size=7)
    first, second = list(loaders.test), list(loaders.test)
    assert_same([first], [second])
    assert torch.cat([labels for _, labels in first]).tolist() == [splits.test[i][1] for i in range(len(splits.test))]
    assert [len(labels) for _, labels in first][:-1] == [7] * ((len(splits.test) - 1) // 7)
    assert len(torch.cat([labels for _, labels in loaders.validation])) == len(splits.validation)


def test_evaluation_images_go_through_what_a_caller_decides(files: DataSplits) -> None:
    config = {**CONFIG, "crop_pct": 0.5}
    plain, cropped = (make_loaders(files, config, 8, augment=augment) for augment in ("none", "paper"))
    whole = evaluation_config(config, "none", in_memory=False)
    decided = make_loaders(files, config, 8, augment="paper", evaluation=whole)
    for name in ("validation", "test"):
        assert_same([list(getattr(decided, name))], [list(getattr(plain, name))])
    assert_same([list(decided.train)], [list(cropped.train)])
    assert not torch.equal(next(iter(decided.test))[0], next(iter(cropped.test))[0])


def test_batches_larger_than_the_data_and_incomplete_ones(memory: DataSplits) -> None:
    assert [len(y) for _, y in make_loaders(memory, CONFIG, 64, drop_last=True).train] == [50]
    assert [len(y) for _, y in make_loaders(memory, CONFIG, 16, drop_last=True).train] == [16] * 3


def test_bad_requests_are_named(memory: DataSplits) -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, got 0"):
        make_loaders(memory, CONFIG, 0)
    with pytest.raises(ValueError, match=r"workers: expected 0 or more, got -1"):
        make_loaders(memory, CONFIG, 8, workers=-1)
    with pytest.raises(ValueError, match=r"evaluation_batch_size: expected at least 1, got 0"):
        make_loaders(memory, CONFIG, 8, evaluation_batch_size=0)
    with pytest.raises(ValueError, match=r"augment: expected one of"):
        make_loaders(memory, CONFIG, 8, augment="heavy")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loader: expected one from make_loaders, got a sampler of type"):
        set_epoch(torch.utils.data.DataLoader(memory.train), 1)  # type: ignore[arg-type]
    empty = ArrayDataset(np.zeros((0, 4, 4, 3), dtype=np.uint8), np.zeros(0, dtype=np.int64))
    hollow = DataSplits("hollow", memory.train, empty, memory.test, ("a",), "", "")
    with pytest.raises(ValueError, match=r"hollow: the validation set is empty"):
        make_loaders(hollow, CONFIG, 8)
