"""What is put into a model: one frozen description, checked once, that also is the saved JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.functional.split import GRANULARITIES, MAX_EXPERTS
from mosa_kernels.nn.adapter import MERGE_RULES, SPARSE
from mosa_kernels.nn.sampler import EXPERT_PER
from mosa_kernels.peft.styles import STYLES, Style

MODES = ("dense", "pruned", "mosa")


@dataclass(frozen=True)
class MoSAConfig:
    """The adapters of one model.

    Args:
        style: where adapters sit: "adaptformer" (parallel to the FFN), "pfeiffer" (after the FFN) or "houlsby" (after
            attention and after the FFN).
        mode: "dense" (a plain adapter), "pruned" (SparseAdapter: one fixed mask keeps 1/N of the weights) or "mosa".
        bottleneck: r.
        num_experts: N; mode "dense" has one whatever is said here, and "pruned" keeps 1/N.
        activation: "gelu", "gelu_tanh", "relu", "silu" or "identity"; None: the style's.
        scale: factor on the adapter's output; None: the style's.
        norm: whether the adapter normalises its input; None: as the style does.
        dropout: probability of dropping an entry of the bottleneck in training.
        sparse: which projection is split, "up" (the paper's hierarchical strategy), "down" or "both".
        granularity: what an expert owns: "element", "row", "column", "block", "even_rows" or "even_columns".
        expert_bias: one up-projection bias per expert, or one that all share.
        merge_rule: "mean" of the experts, or "jigsaw" (arXiv 2312.02923, Eq. 7).
        expert_per: draw an expert per "sample" or per "batch" (the paper).
        expert_scale: factor on the running expert's entries, a number or "N".
        anchored: in `two_pass`, the first pass runs the merged adapter and the second random experts.
        layers: the blocks that get adapters, counted from 0 through all stages, negative from the end; None: all.
        seed: of the splits.
        learnable_scale: whether `scale` is trained.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    style: str = "adaptformer"
    mode: str = "mosa"
    bottleneck: int = 64
    num_experts: int = 4
    activation: str | None = None
    scale: float | None = None
    norm: bool | None = None
    dropout: float = 0.0
    sparse: str = "up"
    granularity: str = "element"
    expert_bias: bool = True
    merge_rule: str = "mean"
    expert_per: str = "sample"
    expert_scale: float | str = 1.0
    anchored: bool = False
    layers: tuple[int, ...] | None = None
    seed: int = 0
    learnable_scale: bool = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("style", tuple(STYLES)),
            ("mode", MODES),
            ("sparse", SPARSE),
            ("granularity", GRANULARITIES),
            ("merge_rule", MERGE_RULES),
            ("expert_per", EXPERT_PER),
        ):
            _check_choice(name, getattr(self, name), choices)
        if self.activation is not None:
            _check_choice("activation", self.activation, tuple(ACTIVATIONS))
        for name, most in (("bottleneck", None), ("num_experts", MAX_EXPERTS)):
            _check_count(name, getattr(self, name), most)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected a whole number, got {self.seed!r}")
        for name in ("expert_bias", "anchored", "learnable_scale"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.norm is not None and not isinstance(self.norm, bool):
            raise TypeError(f"norm: expected True, False or None, got {self.norm!r}")
        if self.scale is not None:
            _check_number("scale", self.scale)
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {self.dropout!r}")
        if self.expert_scale != "N":
            _check_number("expert_scale", self.expert_scale, "a number or 'N'")
        if self.mode == "pruned" and self.num_experts < 2:
            raise ValueError(f"num_experts: expected at least 2 for mode 'pruned', got {self.num_experts}")
        if self.anchored and self.mode != "mosa":
            raise ValueError(f"anchored: expected False for mode {self.mode!r}, which has no experts, got True")
        if self.layers is not None:
            object.__setattr__(self, "layers", _check_layers(self.layers))

    @property
    def placement(self) -> Style:
        """The row of the table of styles that `style` names."""
        return STYLES[self.style]

    def resolved(self) -> MoSAConfig:
        """The same with the style's defaults in place of None."""
        style = self.placement
        return replace(
            self,
            activation=style.activation if self.activation is None else self.activation,
            scale=style.scale if self.scale is None else self.scale,
            norm=style.norm if self.norm is None else self.norm,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoSAConfig:
        """The inverse of `to_dict`; what is absent takes its default.

        Raises:
            ValueError: a key that is no field, or a value out of range.
            TypeError: a value of the wrong type.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))}: no such option; expected some of {', '.join(sorted(known))}"
            )
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MoSAConfig:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a JSON object, or as for `from_dict`.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected the JSON of a MoSAConfig: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"expected the JSON object of a MoSAConfig, got {type(values).__name__}")
        return cls.from_dict(values)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_count(name: str, value: Any, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: expected at least 1{'' if most is None else f' and at most {most}'}, got {value}")


def _check_number(name: str, value: Any, expected: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected {expected} that is finite, got {value!r}")


def _check_layers(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
        raise TypeError(f"layers: expected None or a list of block indices, got {layers!r}")
    found = tuple(layers)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers: expected whole numbers, got {index!r}")
    if not found:
        raise ValueError("layers: expected None (all blocks) or at least one index, got an empty list")
    if len(set(found)) != len(found):
        raise ValueError(f"layers: expected each block once, got {list(found)}")
    return found
