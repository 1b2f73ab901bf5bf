"""DataLoaders that show the same batches again: everything random is a function of (seed, epoch, image number).

The sampler hands out (epoch, image number) pairs, so that the data set needs no state: worker processes, persistent
or not, and a run that is resumed at epoch e see exactly what an uninterrupted run saw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mosa_kernels.data.draws import Draws
from mosa_kernels.data.published import VTAB
from mosa_kernels.data.splits import ArrayDataset, DataSplits, ImageDataset
from mosa_kernels.data.transforms import (
    Augment,
    BatchTransform,
    evaluation_config,
    evaluation_transform,
    training_transform,
)

Key = tuple[int, int]  # (epoch, image number)
Batch = tuple[Tensor, Tensor]  # normalised images float32 [B, 3, H, W], labels int64 [B]


class EpochSampler(Sampler[Key]):
    """Image numbers in an order drawn from (seed, epoch), or in their own order.

    Args:
        count: how many images there are.
        seed: of the order.
        shuffle: False for evaluation.
    """

    def __init__(self, count: int, seed: int, shuffle: bool) -> None:
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Key]:
        epoch = self.epoch
        order = np.arange(self.count)
        if self.shuffle:
            order = Draws(self.seed, f"order/{epoch}", np.zeros(1, dtype=np.int64)).permutation(self.count)[0]
        return ((epoch, number) for number in order.tolist())


class InMemoryBatches(Dataset[Any]):
    """Fetches a whole batch at a time from arrays."""

    def __init__(self, dataset: ArrayDataset, transform: BatchTransform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        numbers = np.array([number for _, number in keys], dtype=np.int64)
        images = self.transform(self.dataset.images[numbers], keys[0][0], numbers)
        return images, torch.from_numpy(self.dataset.labels[numbers])

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])


class TransformedImages(Dataset[Any]):
    """Reads and transforms one image at a time; the transform's randomness is seeded by (seed, epoch, number)."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, number = key
        image, label = self.dataset[number]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        draw = Draws(self.seed, f"augment/{epoch}", np.array([number])).integers(2**31)
        with _seeded(int(draw[0])):
            return self.transform(image), label


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use, and puts them back as they were: a model's own draws go on."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _as_it_is(batch: Any) -> Any:
    """In place of collation: the batch was fetched whole."""
    return batch


@dataclass(frozen=True)
class Loaders:
    """DataLoaders of batches (images float32 [B, 3, H, W], labels int64 [B]).

    `train.sampler.set_epoch(e)`, or `set_epoch(loader, e)` also after accelerate prepared it, chooses the epoch.
    """

    train: DataLoader[Any]
    validation: DataLoader[Any]
    test: DataLoader[Any]


def make_loaders(
    splits: DataSplits,
    model_data_config: Mapping[str, Any],
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    augment: Augment = "none",
    *,
    evaluation: Mapping[str, Any] | None = None,
    evaluation_batch_size: int | None = None,
    drop_last: bool = False,
) -> Loaders:
    """Makes the three loaders.

    Args:
        splits: from `open_data`.
        model_data_config: from `timm.data.resolve_model_data_config(model)`: size, normalisation, interpolation.
        batch_size: images a training batch; a smaller data set is one batch.
        workers: processes that read and transform images; not used for images in memory, where one is faster.
        seed: of order and augmentation.
        augment: "none", "light", "paper" or "official", see `transforms.py`; "official" is "none" for VTAB-1k.
        evaluation: what validation and test images go through, where that is decided: `evaluation_config` of other
            data. Images in memory are resized and never cropped.
        evaluation_batch_size: for validation and test; by default 256, or `batch_size` where that is larger.
        drop_last: leave an incomplete last training batch away.

    Raises:
        ValueError: numbers out of range, an unknown recipe, an unusable data configuration, or an empty data set.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    evaluation_size = max(256, batch_size) if evaluation_batch_size is None else evaluation_batch_size
    if evaluation_size < 1:
        raise ValueError(f"evaluation_batch_size: expected at least 1, got {evaluation_size}")

    recipe = recipe_for(augment, splits)

    def loader(name: str, dataset: ImageDataset, training: bool) -> DataLoader[Any]:
        if len(dataset) == 0:
            raise ValueError(f"{splits.name}: the {name} set is empty")
        if isinstance(dataset, ArrayDataset):
            config = model_data_config if training else evaluation or model_data_config
            batch_transform = BatchTransform(config, recipe, splits.label_preserving, training=training, seed=seed)
            ready: Dataset[Any] = InMemoryBatches(dataset, batch_transform)
        elif training:
            transform = training_transform(model_data_config, recipe, splits.label_preserving)
            ready = TransformedImages(dataset, transform, seed)
        else:
            shown = evaluation or evaluation_config(model_data_config, recipe, in_memory=False)
            ready = TransformedImages(dataset, evaluation_transform(shown), seed)
        processes = 0 if isinstance(dataset, ArrayDataset) else workers
        return DataLoader(
            ready,
            batch_size=min(batch_size, len(dataset)) if training else evaluation_size,
            sampler=EpochSampler(len(dataset), seed, shuffle=training),
            drop_last=drop_last and training,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(seed),  # else each pass would draw from the model's generator
            collate_fn=_as_it_is if isinstance(dataset, ArrayDataset) else None,
        )

    return Loaders(
        train=loader("training", splits.train, True),
        validation=loader("validation", splits.validation, False),
        test=loader("test", splits.test, False),
    )


def recipe_for(augment: Augment, splits: DataSplits) -> Augment:
    """The released code resizes VTAB's images and leaves them whole."""
    return "none" if augment == "official" and splits.benchmark == VTAB else augment


def evaluation_of(splits: DataSplits, model_data_config: Mapping[str, Any], augment: Augment) -> dict[str, Any]:
    """What the test images go through in `make_loaders`, see `evaluation_config`."""
    in_memory = isinstance(splits.test, ArrayDataset)
    return evaluation_config(model_data_config, recipe_for(augment, splits), in_memory=in_memory)


def set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    """Chooses the epoch that the next pass over the loader shows; also for a loader that accelerate has prepared."""
    own = getattr(loader, "set_epoch", None)
    if own is not None:  # accelerate counts epochs itself and would overwrite the sampler's number
        own(epoch)
    sampler = loader.sampler
    batch_sampler = loader.batch_sampler
    while batch_sampler is not None and not isinstance(sampler, EpochSampler):
        sampler = getattr(batch_sampler, "sampler", sampler)
        batch_sampler = getattr(batch_sampler, "batch_sampler", None)
    if not isinstance(sampler, EpochSampler):
        raise TypeError(f"loader: expected one from make_loaders, got a sampler of type {type(sampler).__name__}")
    sampler.set_epoch(epoch)
