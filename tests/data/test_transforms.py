"""What happens to pixels: exact normalisation, and no augmentation that a data set has not allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mosa_kernels.data.splits import AUGMENTATIONS
from mosa_kernels.data.transforms import (
    AUGMENTS,
    Augment,
    BatchTransform,
    evaluation_config,
    evaluation_transform,
    operations,
    training_transform,
)

CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}
NUMBERS = np.arange(64)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


def batch(images: np.ndarray, augment: Augment, allowed: set[str], epoch: int = 0, seed: int = 0) -> torch.Tensor:
    return BatchTransform(CONFIG, augment, frozenset(allowed), training=True, seed=seed)(images, epoch, NUMBERS)


def back_to_pixels(tensor: torch.Tensor) -> np.ndarray:
    """Undoes the normalisation: float64 [B, H, W, 3] in 0 to 255."""
    mean, std = (torch.tensor(CONFIG[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
    return ((tensor.double() * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def test_both_paths_normalise_exactly(images: np.ndarray) -> None:
    expected = (images.astype(np.float64) / 255 - np.array(CONFIG["mean"])) / np.array(CONFIG["std"])
    fast = batch(images, "none", set())
    assert fast.dtype == torch.float32
    assert fast.is_contiguous()
    np.testing.assert_allclose(fast.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
    one = training_transform(CONFIG, "none", frozenset())(Image.fromarray(images[5]))
    np.testing.assert_allclose(one.permute(1, 2, 0).numpy(), expected[5], atol=2e-6)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_nothing_is_done_that_is_not_allowed(images: np.ndarray, augment: Augment) -> None:
    torch.testing.assert_close(batch(images, augment, set()), batch(images, "none", set()), rtol=0, atol=0)
    picture = Image.fromarray(images[0])
    plain = training_transform(CONFIG, "none", frozenset())(picture)
    for _ in range(5):
        got = training_transform(CONFIG, augment, frozenset())(picture)
        torch.testing.assert_close(got, plain, rtol=0, atol=0)


def test_operations_are_the_meeting_of_recipe_and_permission() -> None:
    assert operations("paper", AUGMENTATIONS) == {"crop", "flip"}
    assert operations("light", frozenset({"shift"})) == {"shift"}
    with pytest.raises(ValueError, match=r"augment: expected one of none, light, paper, official, got 'strong'"):
        operations("strong", AUGMENTATIONS)


def test_flips_mirror_about_half_of_the_images(images: np.ndarray) -> None:
    got = back_to_pixels(batch(images, "paper", {"flip"})).round()
    same = (got == images).all(axis=(1, 2, 3))
    mirrored = (got == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 <= mirrored.sum() <= 48


def test_shifts_move_whole_pixels_by_at_most_a_sixteenth(images: np.ndarray) -> None:
    got = back_to_pixels(batch(images, "light", {"shift"})).round()
    seen = set()
    for image, shifted in zip(images, got, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        matches = [
            (dy, dx) for dy in range(5) for dx in range(5) if (padded[dy : dy + 32, dx : dx + 32] == shifted).all()
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(5))


def test_colour_changes_brightness_and_contrast_linearly() -> None:
    grey = np.full((64, 32, 32, 3), 100, dtype=np.uint8)
    grey[:, :16] = 150
    got = back_to_pixels(batch(grey, "light", {"colour"}))
    contrast = (got[:, 20, 0, 0] - got[:, 0, 0, 0]) / -50
    middle = (got[:, 0, 0, 0] - 127.5) - contrast * 22.5
    assert 0.8 <= contrast.min() < 0.87 < 1.13 < contrast.max() <= 1.2
    assert -51.01 <= middle.min() < -30 < 30 < middle.max() <= 51.01


def test_an_augmentation_belongs_to_seed_epoch_and_image(images: np.ndarray) -> None:
    allowed = {"flip", "shift", "colour"}
    transform = BatchTransform(CONFIG, "light", frozenset(allowed), training=True, seed=0)
    whole = transform(images, 3, NUMBERS)
    torch.testing.assert_close(transform(images[10:12], 3, np.array([10, 11])), whole[10:12], rtol=0, atol=0)
    for other in (batch(images, "light", allowed, epoch=4), batch(images, "light", allowed, epoch=3, seed=1)):
        assert (other != whole).flatten(1).any(1).all()


def test_evaluation_is_never_augmented(images: np.ndarray) -> None:
    transform = BatchTransform(CONFIG, "light", AUGMENTATIONS, training=False, seed=0)
    torch.testing.assert_close(transform(images, 0, NUMBERS), batch(images, "none", set()), rtol=0, atol=0)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(20, 50), (300, 40)])
def test_files_of_any_size_fit_the_model(augment: Augment, training: bool, shape: tuple[int, int]) -> None:
    picture = Image.fromarray(np.zeros((*shape, 3), dtype=np.uint8))
    config = {**CONFIG, "input_size": (3, 48, 40)} if augment in ("none", "light") else CONFIG
    if training:
        transform = training_transform(config, augment, AUGMENTATIONS)
    else:
        transform = evaluation_transform(evaluation_config(config, augment, in_memory=False))
    tensor = transform(picture)
    assert tensor.shape == config["input_size"]
    assert tensor.dtype == torch.float32


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("shape", [(20, 50), (64, 64)])
def test_what_is_recorded_is_what_is_done(augment: Augment, shape: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    recorded = evaluation_config(CONFIG, augment, in_memory=False)
    expected, left = picture, (0, 0)
    if augment in ("none", "light"):
        assert (recorded["crop_pct"], recorded["crop_mode"]) == (1.0, "squash")
        expected = picture.resize((32, 32), Image.Resampling.BICUBIC)
    else:  # the shorter side to 32 / 0.9, then the middle
        assert (recorded["crop_pct"], recorded["crop_mode"]) == (0.9, "center")
        sides = [int(35 * side / min(shape)) for side in shape]
        left = tuple(round((side - 32) / 2) for side in sides)
        expected = picture.resize(tuple(sides[::-1]), Image.Resampling.BICUBIC)
    pixels = np.asarray(expected)[left[0] : left[0] + 32, left[1] : left[1] + 32]
    got = back_to_pixels(evaluation_transform(recorded)(picture)[None])[0]
    np.testing.assert_allclose(got, pixels, atol=1e-3)


def test_images_in_memory_are_recorded_as_whole() -> None:
    for augment in AUGMENTS:
        recorded = evaluation_config({**CONFIG, "interpolation": "lanczos"}, augment, in_memory=True)
        assert (recorded["crop_pct"], recorded["crop_mode"], recorded["interpolation"]) == (1.0, "squash", "bilinear")
    assert (
        evaluation_config({**CONFIG, "interpolation": "random"}, "none", in_memory=False)["interpolation"] == "bicubic"
    )
    with pytest.raises(ValueError, match=r"augment: expected one of none"):
        evaluation_config(CONFIG, "strong", in_memory=True)


def test_images_in_memory_are_resized_to_the_model(images: np.ndarray) -> None:
    larger = BatchTransform({**CONFIG, "input_size": (3, 64, 48)}, "none", frozenset(), training=True, seed=0)
    flat = np.broadcast_to(images[:, :1, :1], images.shape)
    got = larger(flat, 0, NUMBERS)
    assert got.shape == (64, 3, 64, 48)
    torch.testing.assert_close(got[:, :, 10, 10], batch(flat, "none", set())[:, :, 0, 0], rtol=1e-4, atol=1e-4)


def test_unusable_configurations_are_named() -> None:
    with pytest.raises(ValueError, match=r"model_data_config: .* without mean, std"):
        training_transform({"input_size": (3, 32, 32)}, "none", frozenset())
    with pytest.raises(ValueError, match=r"model_data_config: expected 3 channels, got input_size \(1, 28, 28\)"):
        training_transform({**CONFIG, "input_size": (1, 28, 28)}, "none", frozenset())
