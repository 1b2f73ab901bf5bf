"""Opening what a run, or `save_adapter`, has left behind."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from mosa_kernels.peft import MoSAConfig
from mosa_kernels.peft.files import CONFIG_FILE, read_adapter
from mosa_kernels.train.backbones import create_backbone
from mosa_kernels.train.folder import CONFIG, TRANSFORMS, RunFolder
from mosa_kernels.train.keeping import HEAD_WEIGHTS, load_trained, read_class_names
from mosa_kernels.train.methods import find_method, method_of, train_head_only
from mosa_kernels.train.recipe import PAPER
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.setup import seed_everything


@dataclass
class Saved:
    """A trained model.

    Attributes:
        model: with its weights, in evaluation mode, on the CPU.
        settings: of the run that trained it, or made up from the adapter's own record where there is no run; without
            data in that case.
        weights: the folder that the weights came from.
        num_classes: outputs of the head.
        class_names: what they mean; None where an older run, or an adapter, does not say.
        normalisation: what the test images of the run went through, see `evaluation_config`; None likewise.
    """

    model: nn.Module
    settings: Settings
    weights: Path
    num_classes: int
    class_names: tuple[str, ...] | None = None
    normalisation: dict[str, Any] | None = None


def open_saved(
    path: Path, *, model: str | None = None, checkpoint: str | None = None, weights: str | None = None
) -> Saved:
    """Opens a run's folder, or a folder with an adapter.

    Args:
        path: of either.
        model: name of the backbone in timm; by default the recorded one.
        checkpoint: file of the backbone's weights; by default the recorded one.
        weights: "best" or "last" of a run; by default what the run selected.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the backbone is not the one that the weights were trained on.
    """
    run = _run_of(path)
    normalisation = None
    if run is None:
        if weights is not None:
            raise ValueError(f"weights: {weights!r} needs the folder of a run, {path} holds an adapter")
        settings, num_classes, directory = _from_adapter(path)
        names = read_class_names(path)
    else:
        config = RunFolder(run).read_config()
        settings = Settings.from_dict(config["settings"])
        num_classes = config["data"]["classes"]
        names = config["data"].get("class_names")
        normalisation = config["normalisation"] if TRANSFORMS in config else None
        directory = path
        if weights is not None and run != path:
            raise ValueError(f"weights: {weights!r} needs the folder of the run, {run}; {path} holds one adapter of it")
        if run == path:
            chosen = weights or settings.recipe.select
            if chosen not in ("best", "last"):
                raise ValueError(f"weights: expected best or last, got {chosen!r}")
            directory = path / "adapter" / chosen
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no weights here; has the run completed an epoch?")
    changes: dict[str, Any] = {"model": model, "checkpoint": checkpoint}
    settings = dataclasses.replace(settings, **{key: value for key, value in changes.items() if value is not None})
    seed_everything(settings.recipe.seed)
    built = create_backbone(
        settings.model,
        num_classes,
        checkpoint=settings.checkpoint,
        pretrained=settings.pretrained,
        image_size=settings.image_size,
    )
    if find_method(settings.method).mode is None:
        train_head_only(built)
    load_trained(built, directory)
    class_names = None if names is None else tuple(names)
    return Saved(built.eval(), settings, directory, num_classes, class_names, normalisation)


def _run_of(path: Path) -> Path | None:
    """The run's folder that this is, or that this lies in."""
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: expected that of a run or of a saved adapter")
    if (path / CONFIG).is_file():
        return path
    inside = path.resolve().parent
    if inside.name == "adapter" and (inside.parent / CONFIG).is_file():
        return inside.parent
    if not (path / CONFIG_FILE).is_file() and not (path / HEAD_WEIGHTS).is_file():
        raise FileNotFoundError(f"{path}: expected {CONFIG} of a run or {CONFIG_FILE} of an adapter, found neither")
    return None


def _from_adapter(path: Path) -> tuple[Settings, int, Path]:
    if not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{path}: the head of a linear probe says nothing of its backbone; give the run's folder")
    description, _ = read_adapter(path)
    backbone = description["backbone"]
    name = ".".join(part for part in (backbone["architecture"], backbone["tag"]) if part)
    if not timm.is_model(backbone["architecture"]):
        raise ValueError(f"{path}: timm has no {backbone['architecture']!r}; name the backbone with --model")
    config = MoSAConfig.from_dict(description["config"])
    recipe = dataclasses.replace(PAPER, merge_rule=config.merge_rule)
    settings = Settings(model=name, data="", method=method_of(config).name, recipe=recipe)
    return settings, int(description["num_classes"]), path
