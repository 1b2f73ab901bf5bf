"""From settings to a model with adapters, its data, and a trainer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from mosa_kernels.data.loaders import Loaders, evaluation_of, make_loaders, recipe_for
from mosa_kernels.data.open import open_data
from mosa_kernels.data.splits import DataSplits
from mosa_kernels.data.transforms import Augment, operations
from mosa_kernels.losses import MoSALoss
from mosa_kernels.peft.placement import find_blocks
from mosa_kernels.train.backbones import bare_model, create_backbone, data_config, require_known
from mosa_kernels.train.keeping import backbone_hash
from mosa_kernels.train.loop import Trainer
from mosa_kernels.train.methods import adapt, find_method, make_optimizer
from mosa_kernels.train.objective import Objective
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.settings import Settings


@dataclass
class Prepared:
    """A model ready to train, with what a record says of it.

    Attributes:
        model: with adapters, on the CPU.
        splits, loaders: the data.
        backbone: name, source and hash of the frozen weights.
        normalisation: size, mean, standard deviation and resizing that the test images go through.
        adapter: activation, scale and norm that the adapters have; empty without adapters.
        augmentations: what is really done to training images: what the recipe wants and the data set allows.
        transforms: the recipe that images go by, see `recipe_for`.
    """

    model: nn.Module
    splits: DataSplits
    loaders: Loaders
    backbone: dict[str, Any]
    normalisation: dict[str, Any]
    adapter: dict[str, Any]
    augmentations: list[str]
    transforms: str


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_accelerator(settings: Settings) -> Accelerator:
    """An accelerator of this precision, whatever an earlier run in this process used.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if settings.mixed_precision == "fp16" and (settings.cpu or not torch.cuda.is_available()):
        raise ValueError("mixed_precision: fp16 needs a GPU; on a CPU use bf16 or no")
    elsewhere = bool(PartialState._shared_state) and bool(PartialState()._cpu) != settings.cpu
    AcceleratorState._reset_state(reset_partial_state=elsewhere)
    return Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulate,
        cpu=settings.cpu,
    )


def device_name(device: torch.device) -> str:
    """Of a GPU what it is called, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def open_splits(settings: Settings, image_size: int) -> DataSplits:
    """The data that the settings name."""
    return open_data(
        settings.data,
        root=settings.data_root,
        seed=settings.data_seed,
        image_size=image_size,
        labels_per_class=settings.labels_per_class,
        label_noise=settings.label_noise,
        download=settings.download,
    )


def native_size(settings: Settings) -> int:
    """Pixels of the images that the backbone takes."""
    if settings.image_size is not None:
        return settings.image_size
    config = timm.get_pretrained_cfg(settings.model, allow_unregistered=True)
    return 224 if config is None else int(config.input_size[-1])


def prepare(settings: Settings, processes: int = 1, splits: DataSplits | None = None) -> Prepared:
    """Opens the data, builds the model, and puts the adapters in; every random number follows from the seeds.

    Args:
        settings: the run's.
        processes: over which the batches are divided.
        splits: the data, where a caller has opened them already.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: what is wrong with the data, the model or an option, by name.
    """
    require_known(settings.model)
    method = find_method(settings.method)
    if splits is None:
        bare = bare_model(settings.model)
        if bare is not None:  # what does not fit is refused before data and weights are fetched
            adapt(bare, method, settings.adapter, settings.recipe, settings.recipe.seed)
        splits = open_splits(settings, native_size(settings))
    if splits.validation_in_train and settings.recipe.select == "best":
        raise ValueError(
            f"select: expected last, got best: {splits.name} trains on its validation images, which cannot choose an "
            "epoch any more"
        )
    seed_everything(settings.recipe.seed)
    model = create_backbone(
        settings.model,
        splits.num_classes,
        checkpoint=settings.checkpoint,
        pretrained=settings.pretrained,
        image_size=settings.image_size,
    )
    backbone = {
        "name": settings.model,
        "checkpoint": settings.checkpoint,
        "pretrained": settings.pretrained or settings.checkpoint is not None,
        "sha256": backbone_hash(model),
    }
    adapters = adapt(model, method, settings.adapter, settings.recipe, settings.recipe.seed)
    config = data_config(model, settings.image_size)
    augment: Augment = settings.recipe.augment  # type: ignore[assignment]  # checked by the recipe
    parts = settings.accumulate * processes
    if settings.recipe.batch_size % parts:
        raise ValueError(
            f"batch_size: {settings.recipe.batch_size} images cannot be divided over {processes} processes and "
            f"{settings.accumulate} accumulated batches"
        )
    loaders = make_loaders(
        splits,
        config,
        settings.recipe.batch_size // parts,
        workers=settings.workers,
        seed=settings.recipe.seed,
        augment=augment,
    )
    normalisation = evaluation_of(splits, config, augment)
    resolved = adapters.resolved() if adapters is not None and method.has_adapters else None
    adapter = {} if resolved is None else {name: getattr(resolved, name) for name in ("activation", "scale", "norm")}
    transforms = recipe_for(augment, splits)
    done = sorted(operations(transforms, splits.label_preserving))
    return Prepared(model, splits, loaders, backbone, normalisation, adapter, done, transforms)


def make_trainer(settings: Settings, prepared: Prepared, accelerator: Accelerator, reporter: Reporter) -> Trainer:
    """The one training loop, configured."""
    recipe = settings.recipe
    prepared.model.to(accelerator.device)  # before the optimizer sees its parameters
    criterion = None
    if settings.passes == 2:
        criterion = MoSALoss(**recipe.loss_options(len(find_blocks(prepared.model))))
    return Trainer(
        model=prepared.model,
        objective=Objective(settings.passes or 1, criterion),
        optimizer=make_optimizer(prepared.model, recipe, settings.optimizer or "adamw"),
        loaders=prepared.loaders,
        recipe=recipe,
        accelerator=accelerator,
        reporter=reporter,
        compile_model=settings.compile,
    )
