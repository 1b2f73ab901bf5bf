"""Backbones by timm name, with weights from the hub, from a file, or from the package itself."""

from __future__ import annotations

import difflib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from zipfile import BadZipFile

import timm
import torch
from torch import Tensor, nn

from mosa_kernels.data.backbone import OFFLINE_BACKBONE  # importing it registers it with timm

# Options that some architectures lack: PVT v2 and SAM 2's Hiera take images of any size.
_NOT_EVERYWHERE = ("drop_path_rate", "img_size")
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # before names that timm looks up elsewhere
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
# The family of checkpoints that the paper starts from; other weights of the same architecture give other numbers.
PAPER_WEIGHTS = {
    "vit_base_patch16_224": "vit_base_patch16_224.orig_in21k",
    "vit_large_patch16_224": "vit_large_patch16_224.orig_in21k",
    "swin_base_patch4_window7_224": "swin_base_patch4_window7_224.ms_in22k",
}


def create_backbone(
    name: str,
    num_classes: int,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
) -> nn.Module:
    """A timm model with a fresh head; dropout and stochastic depth are off, as the frozen backbone's stay off.

    Args:
        name: any name that `timm.create_model` takes ("vit_base_patch16_224.orig_in21k", "hf-hub:...", ...).
        num_classes: outputs of the head.
        checkpoint: a file of weights (.safetensors, .npz of the original ViTs, .pth) in place of the hub's.
        pretrained: False for random weights.
        image_size: pixels, where it differs from the model's own size.

    Raises:
        ValueError: timm has no such model, the file's weights do not fit it, or it takes no images of this size.
        FileNotFoundError: no such file.
        ConnectionError: the weights are neither here nor within reach.
    """
    require_known(name)
    if image_size is None:
        return _with_weights(name, {"num_classes": num_classes}, checkpoint, pretrained)
    if image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    options = {"num_classes": num_classes, "img_size": image_size}
    try:
        model = _with_weights(name, options, checkpoint, pretrained)
    except (ArithmeticError, AssertionError) as error:
        raise _not_taken(name, image_size, error) from error
    _check_image_size(model, name, image_size)
    return model


def _with_weights(name: str, options: dict[str, Any], checkpoint: str | Path | None, pretrained: bool) -> nn.Module:
    if checkpoint is not None:
        model = _create(name, pretrained=False, options=options)
        load_checkpoint(model, Path(checkpoint))
        return model
    if not pretrained:
        return _create(name, pretrained=False, options=options)
    try:
        with offline_if_unreachable():
            return _create(name, pretrained=True, options=options)
    except RuntimeError as error:
        if "No pretrained weights exist" not in str(error):
            raise
        raise ValueError(
            f"model {name}: timm has no weights for it; give a file with --checkpoint, or --no-pretrained"
        ) from error
    except OSError as error:
        if Path(str(getattr(error, "filename", None) or "")).suffix in SUFFIXES:
            raise
        raise ConnectionError(
            f"model {name}: its weights could not be fetched ({_first_line(error)}); without a network, give a file "
            f"with --checkpoint or use the built-in --model {OFFLINE_BACKBONE}"
        ) from error


@torch.no_grad()
def _check_image_size(model: nn.Module, name: str, size: int) -> None:
    """Raises a ValueError unless the model takes images of this size without leaving their edges away."""
    embedding = getattr(model, "patch_embed", None)
    patch = getattr(embedding, "patch_size", None)
    patch = max(patch) if isinstance(patch, tuple) else patch
    projection = getattr(embedding, "proj", None)
    overlapping = isinstance(projection, nn.Conv2d) and projection.kernel_size != projection.stride
    if isinstance(patch, int) and size % patch and not overlapping:
        raise ValueError(f"image_size: expected a multiple of the patch size {patch} of {name}, got {size}")
    training = model.training
    try:
        model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise _not_taken(name, size, error) from error
    finally:
        model.train(training)


def _not_taken(name: str, size: int, error: BaseException) -> ValueError:
    return ValueError(f"image_size: {name} does not take images of {size} pixels ({_first_line(error)})")


def data_config(model: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """Size, normalisation and resizing of the model's images, as timm knows them, at the size that it was made for."""
    given = {} if image_size is None else {"img_size": image_size}
    config: dict[str, Any] = timm.data.resolve_data_config(given, model=model)
    return config


@contextmanager
def offline_if_unreachable(timeout: float = 5.0) -> Iterator[None]:
    """Spares the hub's client its minute of retries where there is no network: only its cache is looked into then."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    host = urlsplit(constants.ENDPOINT)
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if not before and not proxied:
        try:
            socket.create_connection((host.hostname or "", host.port or 443), timeout).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def require_known(name: str) -> None:
    """Raises a ValueError with the nearest names unless timm knows the model."""
    if name.startswith(HUBS):
        return
    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        models = timm.list_models()
        longer = [model for model in models if model.startswith(f"{bare}_")]
        near = list(dict.fromkeys(longer + difflib.get_close_matches(bare, models, n=3, cutoff=0.5)))[:3]
        hint = f"; did you mean {', '.join(near)}?" if near else "; timm.list_models() names them all"
        raise ValueError(f"model: timm has no {bare!r}{hint}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in known:
        raise ValueError(f"model {bare}: expected one of the tags {', '.join(known) or '(none)'}, got {tag!r}")


def bare_model(name: str) -> nn.Module | None:
    """The architecture without storage for weights, in a moment; None where it is not in timm, or computes with them as
    it is made."""
    if name.startswith(HUBS):
        return None
    try:
        with torch.device("meta"):
            return _create(name, pretrained=False, options={})
    except RuntimeError:
        return None


def paper_hint(name: str) -> str | None:
    """A sentence where the name is another set of weights than the paper's for this architecture."""
    family = PAPER_WEIGHTS.get(name.partition(".")[0])
    if family is None or name == family:
        return None
    return f"the paper starts from {family}; {name} names other weights, whose results differ by points"


def require_checkpoint(path: Path) -> None:
    """Finds out before any work whether a file of weights is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"checkpoint: expected a file ending in {', '.join(SUFFIXES)}, got {path.name}")


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads a file of weights into a model whose head may differ from the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file, or weights that do not fit; the message names the first differences.
    """
    require_checkpoint(path)
    if path.suffix == ".npz":
        loader = getattr(model, "load_pretrained", None)
        if loader is None:
            raise ValueError(f"checkpoint: {type(model).__name__} cannot read .npz files; convert it to .safetensors")
        try:
            loader(str(path))
        except (KeyError, AssertionError, RuntimeError, ValueError, BadZipFile, UnpicklingError, EOFError) as error:
            raise ValueError(f"checkpoint {path.name}: it does not fit the model ({_first_line(error)})") from error
        return
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:  # a damaged file makes torch, pickle and safetensors raise whatever comes first
        raise ValueError(f"checkpoint {path}: cannot be read ({_first_line(error)})") from error
    _load_matching(model, _remapped(state, model), path)


def _load_matching(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    head = _head_prefixes(model)
    state = {k: v for k, v in state.items() if not (k.startswith(head) and (k not in own or own[k].shape != v.shape))}
    problems = [f"missing {name}" for name in own if name not in state and not name.startswith(head)]
    problems += [f"unexpected {name}" for name in state if name not in own]
    problems += [
        f"{name} {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"checkpoint {path.name}: it does not fit the model: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state, strict=False)


def _remapped(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's own translation of foreign checkpoints, for the architectures that have one."""
    filter_fn: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(model).__module__], "checkpoint_filter_fn", None
    )
    return state if filter_fn is None else filter_fn(state, model)


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Stochastic depth is set to zero where the architecture has it (some of timm's have it on by default)."""
    options = {"drop_path_rate": 0.0, **options}
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except TypeError as error:
            unknown = next((each for each in _NOT_EVERYWHERE if each in options and each in str(error)), None)
            if unknown is None:
                raise ValueError(f"model {name}: timm does not take {options} for it ({_first_line(error)})") from error
            del options[unknown]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
