"""Everything a user chooses for one run, in one record that is stored with it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mosa_kernels.train.methods import AdapterOptions, find_method
from mosa_kernels.train.recipe import OPTIMIZERS, PAPER, Recipe

PRECISIONS = ("no", "bf16", "fp16")
# Comparisons add it to the data's seed: initial weights, splits, experts and order have seeds of their own.
INITIAL_SEED = 1000
# What may change when a run is resumed: none of it decides a number.
FREE = frozenset({"workers"})


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        model, checkpoint, pretrained, image_size: the backbone, see `create_backbone`.
        data, data_root, download, data_seed, labels_per_class, label_noise: the data, see `open_data`.
        method: see `METHODS`.
        adapter: the adapters' shape.
        passes: forward passes of each batch, 1 or 2; None takes the method's own.
        optimizer: "mosa" or "adamw"; None takes the method's own.
        recipe: how to train; its seed draws order, augmentation, initial weights, split, experts and dropout.
        mixed_precision: "no", "bf16" or "fp16".
        accumulate: batches of which one update is made; the recipe's batch_size counts all of them.
        workers: processes that read images.
        compile: have torch.compile make graphs of the model.
        cpu: do not use a GPU.
    """

    model: str
    data: str
    checkpoint: str | None = None
    pretrained: bool = True
    image_size: int | None = None
    data_root: str | None = None
    download: bool = False
    data_seed: int = 0
    labels_per_class: int = 20
    label_noise: float = 0.0
    method: str = "mosa"
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    passes: int | None = None
    optimizer: str | None = None
    recipe: Recipe = PAPER
    mixed_precision: str = "no"
    accumulate: int = 1
    workers: int = 0
    compile: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        method = find_method(self.method)
        object.__setattr__(self, "adapter", method.complete(self.adapter))
        object.__setattr__(self, "passes", method.passes if self.passes is None else self.passes)
        object.__setattr__(self, "optimizer", method.optimizer if self.optimizer is None else self.optimizer)
        if self.passes not in (1, 2):
            raise ValueError(f"passes: expected 1 or 2, got {self.passes}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision: expected one of {', '.join(PRECISIONS)}, got {self.mixed_precision!r}")
        if self.accumulate < 1 or self.recipe.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch size {self.recipe.batch_size}, got {self.accumulate}"
            )
        if self.passes == 2 and not method.has_adapters:
            raise ValueError(f"passes: expected 1 for method {self.method!r}, whose passes of a batch are alike, got 2")
        if self.adapter.anchored and self.passes != 2:
            raise ValueError("anchored: its consistency loss needs --passes 2, got --passes 1")
        if self.adapter.anchored and self.recipe.regularisation == "none":
            raise ValueError("anchored: expected a consistency loss for the pass that runs experts, got none")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        record["adapter"] = dataclasses.asdict(self.adapter)
        if self.adapter.layers is not None:
            record["adapter"]["layers"] = list(self.adapter.layers)
        return {**record, "recipe": self.recipe.as_dict()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Settings:
        """The inverse of `as_dict`.

        Raises:
            ValueError: the record has other fields, as one of another version may have.
        """
        try:
            return cls(
                **{
                    **record,
                    "adapter": AdapterOptions(**record["adapter"]),
                    "recipe": Recipe(**record["recipe"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"settings: this record is not one of this version ({error})") from error

    def flat(self) -> dict[str, Any]:
        """What may not change on the way, in one level, for a comparison that names differences."""
        record = {key: value for key, value in self.as_dict().items() if key not in FREE}
        adapter, recipe = record.pop("adapter"), record.pop("recipe")
        return record | {f"adapter.{k}": v for k, v in adapter.items()} | {f"recipe.{k}": v for k, v in recipe.items()}
