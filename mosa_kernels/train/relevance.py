"""Options that mean nothing for a method: given by hand they are refused, and no listing of a run shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from mosa_kernels.data.folders import has_every_set
from mosa_kernels.data.lists import named_folder
from mosa_kernels.data.offline import FEW_LABEL_TASKS
from mosa_kernels.data.open import LISTED, NAMED
from mosa_kernels.peft.config import dropout_rates, expert_counts
from mosa_kernels.train.methods import ADAPTER_OPTIONS, AdapterOptions, find_method
from mosa_kernels.train.settings import Settings

FEW_LABELS = tuple(f"offline:{task}" for task in FEW_LABEL_TASKS)
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

    if settings.checkpoint is not None:
        leave({"pretrained"}, f"the weights are those of the checkpoint {settings.checkpoint}")
    found |= meaningless_of_data(settings.data, settings.label_noise)
    if settings.passes == 1:
        leave(_TWO_PASSES, "a run of one pass a batch has cross-entropy alone")
    else:
        _leave_terms(settings, leave)
    # Where no experts take turns, adamw is what the optimizer mosa does.
    turns = _TURNS | {"optimizer"} if settings.optimizer == "mosa" else _TURNS
    if method.has_adapters:
        leave({"prompt_length"}, f"method {method.name!r} has no prompts")
        if settings.adapter.style == "lora":
            leave({"expert_bias"}, "style 'lora' has no bias")
        else:
            leave({"lora_targets"}, f"style {settings.adapter.style!r} adapts no linear layers")
        if method.mode == "dense":
            leave(_OF_EXPERTS | turns | {"num_experts", "granularity"}, f"method {method.name!r} has no experts")
        if method.mode == "pruned":
            leave(_OF_EXPERTS | turns, f"method {method.name!r} has one fixed mask for both projections, no experts")
        if method.mode == "mosa" and not _has_turns(settings.adapter):
            same = "num_experts" if settings.adapter.sparse == "none" else "sparse"
            leave((_OF_EXPERTS - {"sparse"}) | turns | {"granularity", same}, "there is one expert, which owns all")
        return found
    prompts = (method.baseline or "").startswith("vpt")
    leave(ADAPTER_OPTIONS - _PROMPTS if prompts else ADAPTER_OPTIONS, f"method {method.name!r} has no adapters")
    leave(turns, f"method {method.name!r} has no experts")
    if not prompts:
        leave({"dropout"}, f"method {method.name!r} has no bottleneck that it acts on")
    return found


def meaningless_of_data(data: str, label_noise: float = 0.0) -> dict[str, str]:
    """By name of the option, why it changes nothing about data with this address."""
    found: dict[str, str] = {}
    kind, _, address = data.partition(":")
    if kind == "offline":
        found |= dict.fromkeys(("data_root", "download", "decode"), "the images are drawn in memory")
    elif kind in LISTED:
        found["download"] = "the files that the lists name have to be there"
        if not label_noise:
            found["data_seed"] = "the lists say which images are for what"
        if (place := named_folder(address)[1]).is_absolute():
            found["data_root"] = f"the folder {place} is an absolute path"
    elif kind not in NAMED:
        others = ", ".join(f"{each}:" for each in NAMED)
        why = f"the data are a folder of images (named data sets begin with {others})"
        found |= dict.fromkeys(("data_root", "download"), why)
        if not label_noise and has_every_set(data):
            found["data_seed"] = "the folder says which images are for what"
    if data not in FEW_LABELS:
        found["labels_per_class"] = f"it is for {', '.join(FEW_LABELS)}"
    return found


def _leave_terms(settings: Settings, leave: Callable[[Iterable[str], str], None]) -> None:
    """What the loss of two passes has no term for."""
    recipe, method = settings.recipe, find_method(settings.method)
    if not any(dropout_rates(recipe.dropout)) and not (method.mode == "mosa" and _has_turns(settings.adapter)):
        leave(_TWO_PASSES | {"passes"}, "two passes of a batch are alike without experts in turns and dropout")
    if recipe.align == "none":
        leave({"beta", "beta_over_depth"}, "no blocks are aligned (align is none)")
    elif not recipe.beta:
        leave({"align", "beta_over_depth"}, "the alignment has no weight (beta is 0)")
    if not recipe.alpha:
        leave({"detach"}, "the consistency has no weight (alpha is 0)")


def _has_turns(options: AdapterOptions) -> bool:
    """Whether there is more than one expert in any block."""
    return options.sparse != "none" and max(expert_counts(options.num_experts)) > 1


def refuse_meaningless(settings: Settings, given: Iterable[str]) -> None:
    """Checks the options that a user has given.

    Raises:
        ValueError: one of them changes nothing.
    """
    refuse(meaningless(settings), given)


def refuse(found: Mapping[str, str], given: Iterable[str]) -> None:
    """Refuses options by name that are among those found to change nothing.

    Raises:
        ValueError: one of them is.
    """
    for name in given:
        if name in found:
            raise ValueError(f"{name}: has no effect here: {found[name]}; leave it out")
