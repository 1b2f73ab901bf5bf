"""From images to normalised tensors: timm's transforms for files, a vectorised path for images in memory.

    augment    training images                                    evaluation images
    none       resized to the model's size                        the same
    light      resized; flip, small shift, colour                 resized
    paper      RandomResizedCrop, flip                            timm's resize and centre crop
    official   resized to 256/224 of the size, random crop, flip  timm's resize and centre crop

Of these, only what the data set declares to leave its labels right is done: digits are never mirrored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mosa_kernels.data.draws import Draws

Augment = Literal["none", "light", "paper", "official"]
AUGMENTS: tuple[Augment, ...] = get_args(Augment)
_OPERATIONS: dict[Augment, frozenset[str]] = {
    "none": frozenset(),
    "light": frozenset({"flip", "shift", "colour"}),
    "paper": frozenset({"crop", "flip"}),
    "official": frozenset({"crop", "flip"}),
}
SHIFT = 1 / 16  # of the image's side: 2 pixels of 32
COLOUR = 0.2  # brightness moves by up to this share of the range, contrast by up to this factor
EVALUATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
RESIZE_BEFORE_CROP = 256 / 224  # the released code resizes to 256 before it crops 224


def operations(augment: str, label_preserving: frozenset[str]) -> frozenset[str]:
    """The augmentations that are really done: those of the recipe that the data set allows.

    Raises:
        ValueError: an unknown recipe.
    """
    if augment not in AUGMENTS:
        raise ValueError(f"augment: expected one of {', '.join(AUGMENTS)}, got {augment!r}")
    return _OPERATIONS[augment] & label_preserving


def checked_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's data configuration with timm's defaults filled in.

    Args:
        config: from `timm.data.resolve_model_data_config(model)`.

    Raises:
        ValueError: input_size, mean or std are missing or of the wrong length.
    """
    missing = [name for name in ("input_size", "mean", "std") if name not in config]
    if missing:
        raise ValueError(f"model_data_config: expected timm's data configuration, without {', '.join(missing)}")
    channels = config["input_size"][0]
    if channels != 3 or len(config["mean"]) != 3 or len(config["std"]) != 3:
        raise ValueError(
            f"model_data_config: expected 3 channels, got input_size {tuple(config['input_size'])}, "
            f"mean {tuple(config['mean'])}, std {tuple(config['std'])}"
        )
    return {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", **config}


def evaluation_config(config: Mapping[str, Any], augment: str, *, in_memory: bool) -> dict[str, Any]:
    """What validation and test images go through, in timm's words: their transform is made from it, and runs record it.

    Images that are only resized to the model's size, whatever their shape, have crop_pct 1 and crop_mode "squash".

    Args:
        config: the model's data configuration.
        augment: see the module's table.
        in_memory: of images in memory, which are never cropped.

    Raises:
        ValueError: an unknown recipe, or an unusable configuration.
    """
    operations(augment, frozenset())
    cfg = checked_config(config)
    found = {name: cfg[name] for name in EVALUATION}
    if in_memory and found["interpolation"] not in ("bilinear", "bicubic"):
        found["interpolation"] = "bilinear"
    elif found["interpolation"] == "random":
        found["interpolation"] = "bicubic"
    if in_memory or augment in ("none", "light"):
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return found


def evaluation_transform(shown: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """timm's transform of `evaluation_config` for one PIL image: float32 [3, H, W], normalised for the model."""
    from timm.data import create_transform

    transform: Callable[[Image.Image], Tensor] = create_transform(**shown, is_training=False)
    return transform


def training_transform(
    config: Mapping[str, Any], augment: Augment, label_preserving: frozenset[str]
) -> Callable[[Image.Image], Tensor]:
    """The same for a training image, with what the recipe wants and the data set allows."""
    from timm.data import create_transform
    from torchvision import transforms as T
    from torchvision.transforms.functional import InterpolationMode

    cfg = checked_config(config)
    done = operations(augment, label_preserving)
    size = cfg["input_size"][-2:]
    mode = InterpolationMode(cfg["interpolation"] if cfg["interpolation"] != "random" else "bicubic")
    flip = 0.5 if "flip" in done else 0.0
    if augment == "paper" and "crop" in done:
        without_jitter: Any = None  # timm annotates a number, and reads None as "no colour jitter"
        return create_transform(
            cfg["input_size"],
            is_training=True,
            interpolation=cfg["interpolation"],
            mean=cfg["mean"],
            std=cfg["std"],
            hflip=flip,
            color_jitter=without_jitter,
        )
    steps: list[Callable[[Any], Any]] = []
    if augment == "official" and "crop" in done:
        steps += [T.Resize([round(s * RESIZE_BEFORE_CROP) for s in size], mode), T.RandomCrop(size)]
    else:
        steps.append(T.Resize(size, mode))
    if "shift" in done:
        steps.append(T.RandomCrop(size, padding=max(1, round(SHIFT * max(size))), padding_mode="edge"))
    if flip:
        steps.append(T.RandomHorizontalFlip(flip))
    if "colour" in done:
        steps.append(T.ColorJitter(COLOUR, COLOUR))
    return T.Compose([*steps, T.ToTensor(), T.Normalize(cfg["mean"], cfg["std"])])


class BatchTransform:
    """The path for images in memory: a uint8 batch becomes a normalised float batch in a few tensor operations.

    An image's augmentation is a function of (seed, epoch, its number), whatever batch it comes in.

    Args:
        config: the model's data configuration.
        augment: see the module's table.
        label_preserving: what the data set allows.
        training: whether to augment.
        seed: of the augmentation.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        augment: Augment,
        label_preserving: frozenset[str],
        *,
        training: bool,
        seed: int,
    ) -> None:
        cfg = checked_config(config)
        self.size = tuple(cfg["input_size"][-2:])
        self.mode = evaluation_config(config, augment, in_memory=True)["interpolation"]
        self.operations = operations(augment, label_preserving) if training else frozenset()
        self.seed = seed
        std = torch.tensor(cfg["std"]).view(3, 1, 1)
        self._slope = 1 / (255 * std)
        self._offset = -torch.tensor(cfg["mean"]).view(3, 1, 1) / std

    def __call__(self, images: NDArray[np.uint8], epoch: int, numbers: NDArray[np.int64]) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, *input_size]; `numbers` [B] are the images' numbers in the data set."""
        draws = Draws(self.seed, f"augment/{epoch}", numbers)
        flipped, across, down = draws.uniform() < 0.5, draws.uniform(-1, 1), draws.uniform(-1, 1)
        brightness, contrast = draws.uniform(-COLOUR, COLOUR), draws.uniform(1 - COLOUR, 1 + COLOUR)
        if "flip" in self.operations:
            images = np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
        if "shift" in self.operations:
            images = _shifted(images, across, down)
        batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
        if "colour" in self.operations:
            change = [torch.from_numpy(values).view(-1, 1, 1, 1) for values in (contrast, brightness)]
            batch = ((batch - 127.5) * change[0] + 127.5 + 255 * change[1]).clamp_(0, 255)
        if tuple(batch.shape[-2:]) != self.size:
            batch = F.interpolate(batch, self.size, mode=self.mode, antialias=True).clamp_(0, 255)
        return torch.addcmul(self._offset, batch, self._slope).contiguous()


def _shifted(images: NDArray[np.uint8], across: NDArray[np.float32], down: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Moves each image by whole pixels, `across` and `down` in [-1, 1] of the largest shift; edges are repeated."""
    count, height, width = images.shape[:3]
    rows = np.arange(height) + np.rint(down * SHIFT * height).astype(np.int64)[:, None]
    columns = np.arange(width) + np.rint(across * SHIFT * width).astype(np.int64)[:, None]
    rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    return images[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
