"""Offline data sets as a whole: sizes, balance, seeds, and digits whose originals never cross a split."""

from __future__ import annotations

import numpy as np
import pytest

from mosa_kernels.data import OFFLINE_TASKS, digits, open_data
from mosa_kernels.data.procedural import DRAWN_TASKS
from mosa_kernels.data.splits import ArrayDataset


def labels(dataset: object) -> np.ndarray:
    assert isinstance(dataset, ArrayDataset)
    return dataset.labels


@pytest.mark.parametrize("task", ["location", "orientation", "count", "digits"])
def test_targets_have_the_promised_sizes_and_balance(task: str) -> None:
    splits = open_data(f"offline:{task}")
    sizes = (200, 1000) if task == "digits" else (800, 200)
    assert (len(splits.train), len(splits.validation)) == sizes
    assert len(splits.test) >= 3000
    for dataset in (splits.train, splits.validation, splits.test):
        counts = np.bincount(labels(dataset), minlength=splits.num_classes)
        assert counts.max() - counts.min() <= 1
    image, label = splits.test[7]
    assert isinstance(image, np.ndarray)
    assert image.shape == (32, 32, 3)
    assert label == 7
    assert splits.summary()["name"] == f"offline:{task}"


PICTURES = {  # mean, standard deviation and mean step to the neighbour on the right
    "digits": (127.794, 67.839, 12.348),
    "source": (131.726, 69.857, 16.214),
    "location": (124.696, 65.705, 6.452),
    "orientation": (129.451, 64.864, 7.916),
    "count": (128.027, 66.241, 11.452),
    "outlines": (128.897, 69.502, 11.456),
    "weaves": (125.837, 69.758, 17.785),
    "proportions": (123.630, 66.500, 10.199),
    "hollows": (129.147, 71.539, 13.016),
    "glyphs": (127.855, 69.674, 11.981),
    "fills": (123.355, 69.716, 13.445),
}


@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_pictures_are_those_of_the_committed_reports(task: str) -> None:
    """Up to the last bit of a sine, in which machines differ. Other pictures need other reports and backbones."""
    if task == "digits":
        images = digits.draw_digits("test", 60, None, 3)[0].images
    else:
        images, _ = DRAWN_TASKS[task].draw(3, "t", np.arange(60))
    values = images.astype(np.float64)
    found = (values.mean(), values.std(), np.abs(np.diff(values, axis=2)).mean())
    assert found == pytest.approx(PICTURES[task], abs=2e-3)


def test_the_fingerprint_is_of_the_content() -> None:
    first, again = (open_data("offline:digits", seed=3) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    for other in (open_data("offline:digits", seed=4), open_data("offline:digits", seed=3, labels_per_class=19)):
        assert other.fingerprint != first.fingerprint


def test_splits_share_no_picture() -> None:
    splits = open_data("offline:count")
    every = [
        image.tobytes()
        for dataset in (splits.train, splits.validation, splits.test)
        if isinstance(dataset, ArrayDataset)
        for image in dataset.images
    ]
    assert len(set(every)) == len(every) == 800 + 200 + 3200


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_no_original_digit_is_in_two_splits(seed: int) -> None:
    shown = {
        "train": digits.draw_digits("train", 200, 20, seed)[1],
        "validation": digits.draw_digits("validation", 1000, None, seed)[1],
        "test": digits.draw_digits("test", 3000, None, seed)[1],
    }
    assert len(np.unique(shown["train"])) == 200
    scans = digits.originals()[0]
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not np.intersect1d(shown[one], shown[other]).size
        # Nor is there the same scan under another number.
        pictures = [{scans[i].tobytes() for i in shown[split]} for split in (one, other)]
        assert not pictures[0] & pictures[1]


def test_pools_stay_apart_for_every_seed() -> None:
    pools = {split: np.concatenate(by_class) for split, by_class in digits.pools().items()}
    assert np.array_equal(np.sort(np.concatenate(list(pools.values()))), np.arange(1797))
    for seed in range(3):
        for split, pool in pools.items():
            assert np.isin(digits.choose(split, 600, None, seed), pool).all()


def test_digit_labels_are_those_of_the_scans() -> None:
    from sklearn.datasets import load_digits

    dataset, shown = digits.draw_digits("validation", 300, None, 2)
    np.testing.assert_array_equal(dataset.labels, load_digits().target[shown])
    np.testing.assert_array_equal(dataset.labels, np.arange(300) % 10)


def test_ink_is_the_scan_at_its_own_pixels_and_nothing_outside() -> None:
    scans = digits.originals()[0][:5]
    axis = (np.arange(8, dtype=np.float32) + 0.5) / 4 - 1
    u, v = np.broadcast_to(axis[None, None, :], (5, 8, 8)), np.broadcast_to(axis[None, :, None], (5, 8, 8))
    np.testing.assert_allclose(digits.ink_at(scans, u, v), scans, atol=1e-6)
    between = digits.ink_at(scans, u + np.float32(0.125), v)[:, :, :-1]
    np.testing.assert_allclose(between, (scans[:, :, :-1] + scans[:, :, 1:]) / 2, atol=1e-6)
    assert not digits.ink_at(scans, u + np.float32(3), v).any()
    assert not digits.ink_at(scans, u, v - np.float32(3)).any()


@pytest.mark.parametrize("labels_per_class", [1, 60])
def test_labels_per_class(labels_per_class: int) -> None:
    splits = open_data("offline:digits", labels_per_class=labels_per_class, image_size=16)
    assert (np.bincount(labels(splits.train)) == labels_per_class).all()


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match=r"labels_per_class: expected 1 to 60, got 61"):
        open_data("offline:digits", labels_per_class=61)
    with pytest.raises(ValueError, match=r"offline task: expected one of digits, source, .* got 'cats'"):
        open_data("offline:cats")
    with pytest.raises(ValueError, match=r"image_size: expected 16 to 512 pixels, got 8"):
        open_data("offline:count", image_size=8)
    with pytest.raises(FileNotFoundError, match=r"'no/such/place' is neither a folder nor a name.*offline:digits"):
        open_data("no/such/place")
    with pytest.raises(FileNotFoundError, match=r"data: '' is neither a folder nor a name"):
        open_data("")  # an unset variable, and not the current folder
    with pytest.raises(ValueError, match=r"label_preserving: expected some of .*, got \['rotate'\]"):
        open_data("offline:digits", label_preserving=("rotate",))


def test_every_offline_name_opens() -> None:
    assert set(OFFLINE_TASKS) == {
        "digits",
        "source",
        "location",
        "orientation",
        "count",
        "outlines",
        "weaves",
        "proportions",
        "hollows",
        "glyphs",
        "fills",
    }


def test_array_datasets_refuse_what_is_not_images() -> None:
    with pytest.raises(ValueError, match=r"images: expected uint8 \[n, H, W, 3\], got float32"):
        ArrayDataset(np.zeros((2, 4, 4, 3), dtype=np.float32), np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match=r"labels: expected shape \[2\].* got \[3\]"):
        ArrayDataset(np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros(3, dtype=np.int64))
