"""Wrong labels on purpose: how many, which, and what stays right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mosa_kernels.data.loaders import make_loaders
from mosa_kernels.data.noise import with_label_noise
from mosa_kernels.data.open import open_data
from mosa_kernels.data.splits import ImageDataset
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.table_cells import Cell, splits_of

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}


def labels(dataset: ImageDataset) -> np.ndarray:
    return np.array([dataset[i][1] for i in range(len(dataset))])


def test_the_share_is_wrong_and_all_else_is_right() -> None:
    right = open_data("offline:digits", image_size=16, labels_per_class=60)
    noisy = open_data("offline:digits", image_size=16, labels_per_class=60, label_noise=0.4)
    before, after = labels(right.train), labels(noisy.train)
    wrong = before != after
    assert abs(wrong.mean() - 0.4) < 4 * np.sqrt(0.24 / 600)
    assert set(after) == set(range(10))
    shifts = np.bincount((after - before)[wrong] % 10, minlength=10)  # none of the other nine is preferred
    assert shifts[0] == 0
    assert (shifts[1:] > 0.4 * wrong.sum() / 9).all()
    for name in ("validation", "test"):
        assert (labels(getattr(right, name)) == labels(getattr(noisy, name))).all()
    assert f"{wrong.sum()} of 600 training labels wrong" in noisy.note
    assert noisy.fingerprint != right.fingerprint


def test_the_seed_decides_and_every_loader_sees_it() -> None:
    splits = open_data("offline:count", image_size=16)
    one, same, other = (with_label_noise(splits, 0.3, seed) for seed in (1, 1, 2))
    assert (labels(one.train) == labels(same.train)).all()
    assert (labels(one.train) != labels(other.train)).any()
    loader = make_loaders(one, CONFIG, 800).train
    (_, batch) = next(iter(loader))
    assert sorted(batch.tolist()) == sorted(labels(one.train).tolist())
    assert with_label_noise(splits, 0.0, 1) is splits
    assert (labels(with_label_noise(splits, 1.0, 1).train) != labels(splits.train)).all()


def test_files_are_still_read_on_demand(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    right, wrong = open_data(tmp_path), open_data(tmp_path, label_noise=1.0)
    assert (labels(right.train) == 1 - labels(wrong.train)).all()
    assert [np.asarray(wrong.train[i][0])[0, 0, 0] for i in range(3)] == [
        np.asarray(right.train[i][0])[0, 0, 0] for i in range(3)
    ]
    images, batch = next(iter(make_loaders(wrong, CONFIG, 4).train))
    assert images.shape == (4, 3, 16, 16)
    assert batch.shape == (4,)


def test_wrong_shares_are_named() -> None:
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"label_noise: expected a share from 0 to 1, got"):
            open_data("offline:count", image_size=16, label_noise=share)


def test_a_run_has_it_in_its_settings_and_its_identity() -> None:
    settings = Settings(model="vit_offline_patch8_32", data="offline:digits", labels_per_class=5, label_noise=0.4)
    assert Settings.from_dict(settings.as_dict()) == settings
    older = {key: value for key, value in settings.as_dict().items() if key != "label_noise"}
    assert Settings.from_dict(older).label_noise == 0
    with pytest.raises(ValueError, match="settings: this record is not one of this version"):
        Settings.from_dict({**older, "label_sounds": 1})
    clean = Settings(model="vit_offline_patch8_32", data="offline:digits", labels_per_class=5)
    assert Cell("", settings, test=True).identity != Cell("", clean, test=True).identity
    assert "training labels wrong" in splits_of(settings).note
    assert "training labels wrong" not in splits_of(clean).note
