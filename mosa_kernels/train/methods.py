"""What can be trained, by name: the adapter, the number of passes, and the optimizer that go with it."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import MoSAConfig, inject_adapter
from mosa_kernels.train.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: as on the command line.
        mode: of `MoSAConfig`: "dense", "pruned" or "mosa"; None trains the head alone.
        passes: forward passes of each batch.
        optimizer: "mosa" or "adamw".
    """

    name: str
    mode: str | None
    passes: int
    optimizer: str


METHODS = {
    method.name: method
    for method in (
        Method("linear", None, 1, "adamw"),
        Method("adaptformer", "dense", 1, "adamw"),
        Method("sparseadapter", "pruned", 1, "adamw"),
        Method("mosa", "mosa", 2, "mosa"),
    )
}


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    return METHODS[name]


@dataclass(frozen=True)
class AdapterOptions:
    """The shape of the adapters; None takes the style's default (see `MoSAConfig`).

    The recipe's `dropout`, `expert_per` and `merge_rule` complete it.
    """

    style: str = "adaptformer"
    bottleneck: int = 64
    num_experts: int = 4
    sparse: str = "up"
    granularity: str = "element"
    activation: str | None = None
    scale: float | None = None
    norm: bool | None = None
    expert_bias: bool = True
    expert_scale: float | str = 1.0
    anchored: bool = False
    layers: tuple[int, ...] | None = None
    learnable_scale: bool = False

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists only


def adapt(model: nn.Module, method: Method, options: AdapterOptions, recipe: Recipe, seed: int) -> MoSAConfig | None:
    """Puts the method's adapters into a model, in place, and freezes the rest; the head trains.

    Returns:
        The adapters' configuration, or None for linear probing.
    """
    if method.mode is None:
        train_head_only(model)
        return None
    config = MoSAConfig(
        mode=method.mode,
        dropout=recipe.dropout,
        expert_per=recipe.expert_per,
        merge_rule=recipe.merge_rule,
        seed=seed,
        **dataclasses.asdict(options),
    )
    inject_adapter(model, config)
    return config


def train_head_only(model: nn.Module) -> None:
    """Freezes everything but timm's classifier.

    Raises:
        ValueError: the model has no classifier, or one without parameters.
    """
    find = getattr(model, "get_classifier", None)
    heads: Any = None if find is None else find()
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    parameters = [p for head in heads if isinstance(head, nn.Module) for p in head.parameters()]
    if not parameters:
        raise ValueError(f"{type(model).__name__}: expected a timm model with a classifier, num_classes > 0")
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def make_optimizer(model: nn.Module, recipe: Recipe, kind: str) -> torch.optim.Optimizer:
    """AdamW over what trains: "mosa" moves only the experts that were active (Eq. 4), "adamw" everything.

    Raises:
        ValueError: another kind.
    """
    options: dict[str, Any] = {
        "lr": recipe.lr,
        "betas": recipe.betas,
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
    }
    if kind == "mosa":
        return MoSAAdamW(model, **options)
    if kind == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    raise ValueError(f"optimizer: expected mosa or adamw, got {kind!r}")
