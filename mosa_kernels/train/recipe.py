"""Training recipes: every number that decides how a run goes, in one dataclass (arXiv 2312.02923, Table 12)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mosa_kernels.data.transforms import AUGMENTS
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.nn.options import check_choice, check_count, check_not_negative, check_seed
from mosa_kernels.nn.sampler import EXPERT_PER
from mosa_kernels.peft.config import check_dropout
from mosa_kernels.train.evaluate import MECHANISMS

OPTIMIZERS = ("mosa", "adamw")
ALIGNMENTS = ("none", "shallow", "deep", "all", "first-six")
SELECTIONS = ("best", "last")
REGULARISATIONS = ("none", "consistency", "consistency+alignment")
RELEASED_BLOCKS = 6  # the released code aligns so many, from the first on, whatever the model's depth


@dataclass(frozen=True)
class Recipe:
    """How to train; what is adapted is the business of `methods.py`.

    Attributes:
        name: "paper", "official" or what a caller calls its own.
        base_lr: learning rate at a batch of 256, or the learning rate itself where `lr_scaled` is False.
        lr_scaled: whether lr = base_lr * batch / 256 (the linear scaling rule of appendix B).
        epochs, warmup_epochs: length, and the part of it that warms up linearly from zero; then half a cosine to zero.
        lr_per_epoch: the learning rate changes between epochs only, so that the first epoch of a warm-up runs at zero.
        batch_size: images an update, over all processes and accumulation steps.
        weight_decay, betas, eps: of AdamW.
        clip_norm: largest norm of the gradient, or None.
        augment: "none", "light", "paper" or "official" (see `mosa_kernels.data.transforms`).
        alpha, beta: weights of consistency and alignment in Eq. 6.
        align: which blocks are aligned: "none", "shallow" (the first half), "deep" (the other), "all" or "first-six".
        beta_over_depth: divide beta by the number of blocks, as the released code does.
        detach: whether the target of each consistency term is held constant.
        expert_per: an expert per "batch" or per "sample".
        expert_lr: factor on the learning rate of what experts own. Where one of N is drawn for each batch, it makes an
            Nth of the steps of everything else; a factor of N lets it go as far.
        dropout: on the adapters' bottleneck; a number, one for each block with adapters, or "first:last", in even steps
            over these blocks.
        merge_rule: "mean" or "jigsaw"; validation runs the adapter merged by it.
        inference: which mechanism of Table 10 the test reports: "merged", "stochastic", "fixed" or "ensemble".
        select: "best" validation accuracy (the earliest of equals) or the "last" epoch.
        seed: of everything random, unless the user gives one.
    """

    name: str
    base_lr: float = 1e-3
    lr_scaled: bool = True
    epochs: int = 100
    warmup_epochs: float = 10.0
    lr_per_epoch: bool = False
    batch_size: int = 128
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None
    augment: str = "paper"
    alpha: float = 1.0
    beta: float = 1.0
    align: str = "shallow"
    beta_over_depth: bool = False
    detach: bool = False
    expert_per: str = "batch"
    expert_lr: float = 1.0
    dropout: float | str | tuple[float, ...] = 0.0
    merge_rule: str = "mean"
    inference: str = "merged"
    select: str = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists only
        for name, choices in (
            ("augment", AUGMENTS),
            ("align", ALIGNMENTS),
            ("expert_per", EXPERT_PER),
            ("merge_rule", MERGE_RULES),
            ("inference", MECHANISMS),
            ("select", SELECTIONS),
        ):
            check_choice(name, getattr(self, name), choices)
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        for name in ("base_lr", "weight_decay", "alpha", "beta"):
            check_not_negative(name, getattr(self, name))
        for name in ("expert_lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        object.__setattr__(self, "dropout", check_dropout(self.dropout))  # JSON has lists only
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm: expected a positive number or None, got {self.clip_norm}")
        check_seed("seed", self.seed)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs: expected at least 0 and less than the {self.epochs} epochs, got {self.warmup_epochs}"
            )

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.base_lr * self.batch_size / 256 if self.lr_scaled else self.base_lr

    @property
    def reported(self) -> str:
        """The mechanism, as `evaluate` names it, that counts as the accuracy of a model with experts."""
        return self.merge_rule if self.inference == "merged" else self.inference

    @property
    def regularisation(self) -> str:
        """The row of Table 7 that this is."""
        if self.beta and self.align != "none":
            return "consistency+alignment" if self.alpha else "alignment"
        return "consistency" if self.alpha else "none"

    def loss_options(self, depth: int) -> dict[str, Any]:
        """What `MoSALoss` takes, for a model of so many blocks."""
        first = tuple(range(min(RELEASED_BLOCKS, depth)))
        return {
            "alpha": self.alpha,
            "beta": self.beta / depth if self.beta_over_depth else self.beta,
            "align": first if self.align == "first-six" else self.align,
            "detach_targets": self.detach,
        }

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        numbers = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in numbers.items()}


PAPER = Recipe(name="paper")
# Facts about the released code; it differs from the paper's text in each of these.
OFFICIAL = Recipe(
    name="official",
    lr_scaled=False,
    lr_per_epoch=True,
    eps=1e-6,
    augment="official",
    beta=0.01,  # over the depth, where alignment is switched on: align="first-six"
    beta_over_depth=True,
    align="none",
    detach=True,
    dropout=0.1,
    seed=3407,
)
RECIPES = {recipe.name: recipe for recipe in (PAPER, OFFICIAL)}


# Of a large backbone, the paper trains half as long on batches half as large (Table 12).
LARGE: dict[str, Any] = {"batch_size": 64, "epochs": 50, "warmup_epochs": 10.0}


def make_recipe(name: str = "paper", model: str | None = None, **overrides: Any) -> Recipe:
    """A named recipe with some numbers replaced; an override of None is no override.

    `lr` sets the peak learning rate itself, `regularisation` the row of Table 7. With other `epochs` the warm-up keeps
    its share of them.

    Args:
        name: one of `RECIPES`.
        model: timm's name of the backbone; of a large one (ViT-L), the batch is 64 and the run 50 epochs.
        overrides: fields of `Recipe`, `lr`, or `regularisation`.

    Raises:
        ValueError: an unknown recipe or number, both `lr` and `base_lr`, or a value out of range.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    base = RECIPES[name]
    if model is not None and "_large_" in model:
        base = dataclasses.replace(base, **LARGE)
    return changed(base, **overrides)


def changed(base: Recipe, **overrides: Any) -> Recipe:
    """A recipe with some numbers replaced, as `make_recipe` does.

    Raises:
        ValueError: an unknown number, two that exclude each other, or a value out of range.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if "lr" in given:
        if "base_lr" in given:
            raise ValueError("lr, base_lr: expected one of them, got both")
        if given.get("lr_scaled"):
            raise ValueError("lr_scaled: it is for base_lr; lr is the peak learning rate itself")
        check_not_negative("lr", given["lr"])
        given |= {"base_lr": given.pop("lr"), "lr_scaled": False}
    known = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    unknown = sorted(set(given) - known - {"regularisation"})
    if unknown:
        raise ValueError(f"recipe: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    given = regularised(given, base)
    if given.get("epochs", base.epochs) != base.epochs and "warmup_epochs" not in given:
        given["warmup_epochs"] = base.warmup_epochs * given["epochs"] / base.epochs
    return dataclasses.replace(base, **given)


def regularised(given: dict[str, Any], base: Recipe) -> dict[str, Any]:
    """The same with "regularisation" spelled out as alpha, beta and align; what is given beside it comes first.

    Raises:
        ValueError: no row of Table 7.
    """
    rest = dict(given)
    kind = rest.pop("regularisation", None)
    if kind is None:
        return rest
    check_choice("regularisation", kind, REGULARISATIONS)
    alpha = 0.0 if kind == "none" else base.alpha or 1.0
    if kind != REGULARISATIONS[-1]:
        return {"alpha": alpha, "align": "none", **rest}
    usual = "first-six" if base.beta_over_depth else "shallow"
    return {"alpha": alpha, "align": usual if base.align == "none" else base.align, **rest}
