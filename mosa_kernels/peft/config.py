"""What is put into a model: one frozen description, checked once, that also is the saved JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.functional.split import GRANULARITIES, MAX_EXPERTS
from mosa_kernels.nn.adapter import MERGE_RULES, SPARSE
from mosa_kernels.nn.options import (
    check_choice,
    check_count,
    check_expert_scale,
    check_flag,
    check_number,
    check_probability,
    check_seed,
    check_whole,
)
from mosa_kernels.nn.sampler import EXPERT_PER
from mosa_kernels.peft.styles import LORA_TARGETS, STYLES, Site, Style

MODES = ("dense", "pruned", "mosa")
METHODS = ("adapter", "full", "linear", "bitfit", "vpt-shallow", "vpt-deep")


@dataclass(frozen=True)
class MoSAConfig:
    """The adapters of one model, or the baseline that they are compared with.

    Args:
        style: where adapters sit: "adaptformer" (parallel to the FFN), "pfeiffer" (after the FFN), "houlsby" (after
            attention and after the FFN) or "lora" (added to what linear layers of attention make of their input).
        mode: "dense" (a plain adapter), "pruned" (SparseAdapter: one fixed mask keeps 1/N of the weights) or "mosa".
        bottleneck: r.
        num_experts: N, or one N for each block that gets adapters, in their order, or "first:last", which steps by one
            from the first to the last over equal parts of the blocks ("1:4": of twelve, three with one expert, three
            with two and so on); mode "dense" has one whatever is said here, and "pruned" keeps 1/N.
        activation: "gelu", "gelu_tanh", "relu", "silu" or "identity"; None: the style's.
        scale: factor on the adapter's output; None: the style's.
        norm: whether the adapter normalises its input; None: as the style does.
        dropout: probability of dropping an entry of the bottleneck in training, or one for each block that gets
            adapters, or "first:last", in even steps from the first of these blocks to the last ("0:0.3": of four, 0,
            0.1, 0.2 and 0.3).
        sparse: which projection is split, "up" (the paper's hierarchical strategy), "down", "both", or "none" (Table
            6's dense down and dense up: one expert, which owns everything).
        granularity: what an expert owns: "element", "row", "column", "block", "even_rows" or "even_columns".
        expert_bias: one up-projection bias per expert, or one that all share.
        merge_rule: "mean" of the experts, or "jigsaw" (arXiv 2312.02923, Eq. 7).
        expert_per: draw an expert per "sample" or per "batch" (the paper).
        expert_scale: factor on the running expert's entries, a number or "N".
        anchored: in `two_pass`, the first pass runs the merged adapter and the second random experts.
        layers: the blocks that get adapters, counted from 0 through all stages, negative from the end; None: all.
        seed: of the splits.
        learnable_scale: whether `scale` is trained.
        lora_targets: of style "lora", which linear layers: some of "q", "k", "v" and "proj" (the output projection).
        method: "adapter", or a baseline that has none and takes no notice of the fields above but those named here:
            "linear" trains the head alone, "full" every parameter, "bitfit" (arXiv 2106.10199) the backbone's biases,
            "vpt-shallow" and "vpt-deep" (arXiv 2203.12119) prompt tokens after the class token, before the first
            block or anew before each one (`layers`, `dropout` and `seed` apply). The head trains in all of them. What
            "full" and "bitfit" train are copies, so "full" takes the memory of a second backbone.
        prompt_length: how many prompt tokens, per block for "vpt-deep".

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    style: str = "adaptformer"
    mode: str = "mosa"
    bottleneck: int = 64
    num_experts: int | str | tuple[int, ...] = 4
    activation: str | None = None
    scale: float | None = None
    norm: bool | None = None
    dropout: float | str | tuple[float, ...] = 0.0
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
    lora_targets: tuple[str, ...] = ("q", "v")
    method: str = "adapter"
    prompt_length: int = 10

    def __post_init__(self) -> None:
        for name, choices in (
            ("style", tuple(STYLES)),
            ("mode", MODES),
            ("sparse", (*SPARSE, "none")),
            ("granularity", GRANULARITIES),
            ("merge_rule", MERGE_RULES),
            ("expert_per", EXPERT_PER),
            ("method", METHODS),
        ):
            check_choice(name, getattr(self, name), choices)
        if self.activation is not None:
            check_choice("activation", self.activation, tuple(ACTIVATIONS))
        for name in ("bottleneck", "prompt_length"):
            check_count(name, getattr(self, name))
        if _is_listing(self.num_experts):
            object.__setattr__(self, "num_experts", tuple(self.num_experts))  # type: ignore[arg-type]
        counts = expert_counts(self.num_experts)
        if not counts:
            raise ValueError("num_experts: expected a number or one for each block, got an empty list")
        for count in counts:
            check_count("num_experts", count, MAX_EXPERTS)
        check_seed("seed", self.seed)
        for name in ("expert_bias", "anchored", "learnable_scale"):
            check_flag(name, getattr(self, name))
        if self.norm is not None and not isinstance(self.norm, bool):
            raise TypeError(f"norm: expected True, False or None, got {self.norm!r}")
        if self.scale is not None:
            check_number("scale", self.scale)
        object.__setattr__(self, "dropout", check_dropout(self.dropout))
        check_expert_scale(self.expert_scale)
        if self.mode == "pruned" and min(counts) < 2:
            raise ValueError(f"num_experts: expected at least 2 for mode 'pruned', got {self.num_experts}")
        if self.mode == "pruned" and self.sparse == "none":
            raise ValueError("sparse: expected up, down or both for mode 'pruned', which keeps 1/N, got 'none'")
        alone = {
            f"mode {self.mode!r}": self.mode != "mosa",
            "sparse 'none'": self.sparse == "none",
            f"num_experts {self.num_experts}": max(counts) == 1,
        }
        without = next((words for words, is_so in alone.items() if is_so), None)
        if self.anchored and without is not None:
            raise ValueError(f"anchored: expected False for {without}, which has no experts to take turns, got True")
        if self.layers is not None:
            object.__setattr__(self, "layers", _check_layers(self.layers))
        object.__setattr__(self, "lora_targets", _check_targets(self.lora_targets))
        if self.style == "lora":
            self._check_linear()

    def _check_linear(self) -> None:
        """What folds into a weight is linear."""
        if self.activation not in (None, "identity"):
            raise ValueError(f"activation: expected None or identity for style 'lora', got {self.activation!r}")
        if self.norm:
            raise ValueError("norm: expected None or False for style 'lora', whose updates fold into weights, got True")

    def experts_of(self, blocks: int) -> list[int]:
        """N of each of the `blocks` blocks that get adapters.

        Raises:
            ValueError: `num_experts` lists another number of blocks.
        """
        if self.mode == "dense" or self.sparse == "none":
            return [1] * blocks
        counts = expert_counts(self.num_experts)
        if not isinstance(self.num_experts, tuple):
            return [counts[len(counts) * block // blocks] for block in range(blocks)]
        if len(self.num_experts) != blocks:
            raise ValueError(
                f"num_experts: expected one number, or one for each of the {blocks} blocks with adapters, got "
                f"{len(self.num_experts)}: {list(self.num_experts)}"
            )
        return list(self.num_experts)

    def dropout_of(self, blocks: int) -> list[float]:
        """The dropout of each of the `blocks` blocks that get adapters, or prompts.

        Raises:
            ValueError: `dropout` lists another number of blocks.
        """
        if isinstance(self.dropout, tuple):
            if len(self.dropout) != blocks:
                raise ValueError(
                    f"dropout: expected one number, or one for each of the {blocks} blocks, got {len(self.dropout)}: "
                    f"{list(self.dropout)}"
                )
            return list(self.dropout)
        ends = dropout_rates(self.dropout)
        first, rise, steps = ends[0], ends[-1] - ends[0], max(blocks - 1, 1)
        # Rounded: 0.1 reads better than 0.09999999999999999.
        return [round(first + rise * block / steps, 9) for block in range(blocks)]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where in a block its adapters sit; none for the baselines."""
        if self.method != "adapter":
            return ()
        return self.lora_targets if self.style == "lora" else self.placement.sites  # type: ignore[return-value]

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


def expert_counts(num_experts: int | str | tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of experts that blocks have, in their order; see `MoSAConfig`.

    Raises:
        ValueError: a text that is not "first:last".
    """
    if not isinstance(num_experts, str):
        return num_experts if isinstance(num_experts, tuple) else (num_experts,)
    ends = re.fullmatch(r"(\d{1,4}):(\d{1,4})", num_experts, re.ASCII)
    if ends is None:
        raise ValueError(
            "num_experts: expected a number, one for each block, or the first and the last as '1:4', got "
            f"{num_experts!r}"
        )
    first, last = int(ends[1]), int(ends[2])
    step = 1 if first <= last else -1
    return tuple(range(first, last + step, step))


def dropout_rates(dropout: float | str | tuple[float, ...]) -> tuple[float, ...]:
    """The numbers that a dropout names: one, one for each block, or the first and the last; see `MoSAConfig`.

    Raises:
        ValueError: a text that is not "first:last".
    """
    if not isinstance(dropout, str):
        return dropout if isinstance(dropout, tuple) else (dropout,)
    try:
        first, last = map(float, dropout.split(":"))
    except ValueError:
        raise ValueError(
            f"dropout: expected a number, one for each block, or the first and the last as '0:0.3', got {dropout!r}"
        ) from None
    return first, last


def check_dropout(dropout: Any) -> float | str | tuple[float, ...]:
    """As given, a list as a tuple.

    Raises:
        TypeError: no number.
        ValueError: a number that is below 0 or not below 1, no number at all, or as for `dropout_rates`.
    """
    if _is_listing(dropout):
        dropout = tuple(dropout)
    rates = dropout_rates(dropout)
    if not rates:
        raise ValueError("dropout: expected a number or one for each block, got an empty list")
    for rate in rates:
        check_probability("dropout", rate)
    return dropout


def _is_listing(value: Any) -> bool:
    try:
        iter(value)  # a tensor without dimensions has `__iter__`, and refuses
    except TypeError:
        return False
    return not isinstance(value, (str, bytes))


def _check_targets(targets: Any) -> tuple[str, ...]:
    """In the order of `LORA_TARGETS`, so that the order in which they are given changes nothing."""
    listed = tuple(targets) if _is_listing(targets) else (targets,)
    known = all(isinstance(target, str) and target in LORA_TARGETS for target in listed)
    if not listed or not known or len(set(listed)) != len(listed):
        raise ValueError(f"lora_targets: expected some of {', '.join(LORA_TARGETS)}, each once, got {targets!r}")
    return tuple(target for target in LORA_TARGETS if target in listed)


def _check_layers(layers: Any) -> tuple[int, ...]:
    if not _is_listing(layers):
        raise TypeError(f"layers: expected None or a list of block indices, got {layers!r}")
    found = tuple(layers)
    for index in found:
        check_whole("layers", index, "whole numbers")
    if not found:
        raise ValueError("layers: expected None (all blocks) or at least one index, got an empty list")
    if len(set(found)) != len(found):
        raise ValueError(f"layers: expected each block once, got {list(found)}")
    return found
