"""Options that mean nothing for a method: given by hand they are refused, and no listing of a run shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from mosa_kernels.data.offline import FEW_LABEL_TASKS
from mosa_kernels.train.methods import AdapterOptions, find_method
from mosa_kernels.train.settings import Settings

FEW_LABELS = tuple(f"offline:{task}" for task in FEW_LABEL_TASKS)
_ADAPTER = frozenset(field.name for field in dataclasses.fields(AdapterOptions))
_PROMPTS = frozenset({"layers", "prompt_length"})
_OF_EXPERTS = frozenset({"sparse", "expert_bias", "expert_scale", "anchored"})
_TURNS = frozenset({"expert_per", "expert_lr", "merge_rule", "inference"})
_TWO_PASSES = frozenset({"alpha", "beta", "regularisation", "align", "beta_over_depth", "detach"})


def meaningless(settings: Settings) -> dict[str, str]:
    """By name of the option, why it changes nothing about such a run."""
    method = find_method(settings.method)
    found: dict[str, str] = {}

    def leave(names: Iterable[str], why: str) -> None:
        for name in names:
            found.setdefault(name, why)

    if settings.data.startswith("offline:"):
        leave({"data_root", "download"}, "the images are drawn in memory")
    if settings.data not in FEW_LABELS:
        leave({"labels_per_class"}, f"it is for {', '.join(FEW_LABELS)}")
    if settings.passes == 1:
        leave(_TWO_PASSES, "a run of one pass a batch has cross-entropy alone")
    if method.has_adapters:
        leave({"prompt_length"}, f"method {method.name!r} has no prompts")
        if settings.adapter.style == "lora":
            leave({"expert_bias"}, "style 'lora' has no bias")
        else:
            leave({"lora_targets"}, f"style {settings.adapter.style!r} adapts no linear layers")
        if method.mode == "dense":
            leave(_OF_EXPERTS | _TURNS | {"num_experts", "granularity"}, f"method {method.name!r} has no experts")
        if method.mode == "pruned":
            leave(_OF_EXPERTS | _TURNS, f"method {method.name!r} has one fixed mask for both projections, no experts")
        return found
    prompts = (method.baseline or "").startswith("vpt")
    leave(_ADAPTER - _PROMPTS if prompts else _ADAPTER, f"method {method.name!r} has no adapters")
    leave(_TURNS, f"method {method.name!r} has no experts")
    if not prompts:
        leave({"dropout"}, f"method {method.name!r} has no bottleneck that it acts on")
    return found


def refuse_meaningless(settings: Settings, given: Iterable[str]) -> None:
    """Checks the options that a user has given.

    Raises:
        ValueError: one of them changes nothing.
    """
    found = meaningless(settings)
    for name in given:
        if name in found:
            raise ValueError(f"{name}: has no effect here: {found[name]}; leave it out")
