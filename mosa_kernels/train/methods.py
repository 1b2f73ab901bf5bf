"""What can be trained, by name: the adapter or baseline, the number of passes, and the optimizer that go with it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mosa_kernels.nn.projection import taken_in_turns
from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import MoSAConfig, inject_adapter
from mosa_kernels.train.recipe import Recipe

# What validation chooses: numbers by name, or a text such as "0:0.3".
Numbers = Mapping[str, float | str]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: as on the command line.
        mode: of `MoSAConfig`: "dense", "pruned" or "mosa"; None trains the head alone.
        passes: forward passes of each batch.
        optimizer: "mosa" or "adamw".
        style: of `MoSAConfig`, where the method has one of its own; None leaves it to the user.
        baseline: the `method` of `MoSAConfig` for what has no adapters.
    """

    name: str
    mode: str | None
    passes: int
    optimizer: str
    style: str | None = None
    baseline: str | None = None

    @property
    def has_adapters(self) -> bool:
        """Whether it puts adapters into the model, and no prompts or nothing."""
        return self.mode is not None and self.baseline is None

    def complete(self, options: AdapterOptions) -> AdapterOptions:
        """The options with style and bottleneck filled in, where the method has adapters.

        Raises:
            ValueError: the options name another style than the method's own.
        """
        if not self.has_adapters:
            return options
        if self.style is not None and options.style not in (None, self.style):
            raise ValueError(f"style: method {self.name!r} has style {self.style!r}, got {options.style!r}")
        style = self.style or options.style or DEFAULT_STYLE
        bottleneck = BOTTLENECKS.get(style, DEFAULT_BOTTLENECK) if options.bottleneck is None else options.bottleneck
        return dataclasses.replace(options, style=style, bottleneck=bottleneck)


DEFAULT_STYLE = "adaptformer"
DEFAULT_BOTTLENECK = 64
BOTTLENECKS = {"lora": 16}  # the rank of arXiv 2312.02923, Table 5

METHODS = {
    method.name: method
    for method in (
        Method("full", "dense", 1, "adamw", baseline="full"),
        Method("linear", None, 1, "adamw"),
        Method("bitfit", "dense", 1, "adamw", baseline="bitfit"),
        Method("vpt-shallow", "dense", 1, "adamw", baseline="vpt-shallow"),
        Method("vpt-deep", "dense", 1, "adamw", baseline="vpt-deep"),
        Method("adaptformer", "dense", 1, "adamw"),
        Method("pfeiffer", "dense", 1, "adamw", "pfeiffer"),
        Method("houlsby", "dense", 1, "adamw", "houlsby"),
        Method("lora", "dense", 1, "adamw", "lora"),
        Method("sparseadapter", "pruned", 1, "adamw"),
        Method("sparselora", "pruned", 1, "adamw", "lora"),
        Method("mosa", "mosa", 2, "mosa"),
        Method("mosl", "mosa", 2, "mosa", "lora"),
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


def method_of(config: MoSAConfig) -> Method:
    """The method that makes such a configuration."""
    if config.method != "adapter":
        return next(each for each in METHODS.values() if config.method in (each.baseline, each.name))
    fitting = [each for each in METHODS.values() if each.mode == config.mode and each.baseline is None]
    own = (each for each in fitting if each.style == config.style)
    return next(own, next(each for each in fitting if each.style is None))


@dataclass(frozen=True)
class AdapterOptions:
    """The shape of the adapters; None takes the style's default (see `MoSAConfig`).

    The recipe's `dropout`, `expert_per` and `merge_rule` complete it. Of the baselines, `layers` and `prompt_length`
    are for prompts; the rest has no meaning for them.
    """

    style: str | None = None
    bottleneck: int | None = None
    num_experts: int | str | tuple[int, ...] = 4
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
    lora_targets: tuple[str, ...] = ("q", "v")
    prompt_length: int = 10

    def __post_init__(self) -> None:
        for name in ("layers", "num_experts", "lora_targets"):  # JSON has lists only
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))


ADAPTER_OPTIONS = frozenset(option.name for option in dataclasses.fields(AdapterOptions))


def split_numbers(numbers: Numbers) -> tuple[dict[str, float | str], dict[str, float | str]]:
    """Numbers that were chosen together: those that are options of the adapters, and those of the recipe."""
    shape = {name: value for name, value in numbers.items() if name in ADAPTER_OPTIONS}
    return shape, {name: value for name, value in numbers.items() if name not in shape}


def number_words(name: str, value: float | str) -> str:
    """One of them as it is printed: "lr 0.01", "dropout 0:0.3"."""
    return f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"


def adapt(model: nn.Module, method: Method, options: AdapterOptions, recipe: Recipe, seed: int) -> MoSAConfig | None:
    """Puts the method's adapters, or what a baseline trains, into a model, in place; freezes the rest; the head trains.

    Returns:
        The configuration, or None for linear probing.

    Raises:
        ValueError: an option is out of range or does not fit the method or the model.
    """
    if method.mode is None:
        train_head_only(model)
        return None
    if method.baseline is not None:
        config = MoSAConfig(
            method=method.baseline,
            dropout=recipe.dropout,
            layers=options.layers,
            prompt_length=options.prompt_length,
            seed=seed,
        )
        inject_adapter(model, config)
        return config
    config = MoSAConfig(
        mode=method.mode,
        dropout=recipe.dropout,
        expert_per=recipe.expert_per,
        merge_rule=recipe.merge_rule,
        seed=seed,
        **dataclasses.asdict(method.complete(options)),
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
        ValueError: another kind, or a learning rate of experts where they do not move one by one.
    """
    options: dict[str, Any] = {
        "lr": recipe.lr,
        "betas": recipe.betas,
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
    }
    if recipe.expert_lr != 1.0:
        rest: list[torch.Tensor] = []
        turns: list[torch.Tensor] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (rest if taken_in_turns(parameter) is None else turns).append(parameter)
        if kind != "mosa" or not turns:
            raise ValueError(f"expert_lr: needs experts and the optimizer mosa, got {recipe.expert_lr} without them")
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": turns, "lr": recipe.lr * recipe.expert_lr}]
        return MoSAAdamW(groups, **options)
    if kind == "mosa":
        return MoSAAdamW(model, **options)
    if kind == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    raise ValueError(f"optimizer: expected mosa or adamw, got {kind!r}")
