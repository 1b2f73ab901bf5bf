"""Exact parameter counts: what trains, what is stored for it, and the size of the backbone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.projection import Projection
from mosa_kernels.peft.backbone import unfrozen_parameters
from mosa_kernels.peft.book import book_of, check_unrouted, holder_of, unwrap
from mosa_kernels.peft.head import current_head

KINDS = ("down weights", "up weights", "biases", "norms", "scales", "prompts", "backbone")


@dataclass(frozen=True)
class Count:
    """One kind of parameters.

    Attributes:
        stored: entries of the tensors that require a gradient.
        active: those that can change: for a pruned adapter the kept 1/N of the weights, otherwise all.
    """

    stored: int = 0
    active: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.stored + other.stored, self.active + other.active)


@dataclass(frozen=True)
class TrainableParameters:
    """What trains in a model with adapters.

    Attributes:
        kinds: down weights, up weights, biases, norms and scales of the active adapter; of a baseline, prompts, or
            what it trains of the backbone. Of the biases, one per output feature is counted here, as in the paper.
        expert_biases: what one bias per expert adds to that, (N - 1) * d for each adapter.
        head: what trains of the classifier, and in a model around the timm model.
        backbone: parameters of the backbone without a classifier; all frozen but those that a baseline trains, and
            those that somebody has unfrozen.
        unfrozen: how many these last are.
    """

    kinds: dict[str, Count]
    expert_biases: int
    head: int
    backbone: int
    unfrozen: int = 0

    @property
    def adapter(self) -> Count:
        """The adapter without the head, and with one bias where experts have one each.

        Of adapters beside the feed-forward network the paper's counts leave out the LayerNorm, which is counted here:
        bottleneck 64 in ViT-B/16 has 1,208,064, and 1,189,632 without it, the paper's 1.19 M.
        """
        return sum(self.kinds.values(), Count())

    @property
    def total(self) -> int:
        """Everything whose gradient is taken: adapter, biases of all experts, head, what is unfrozen."""
        return self.adapter.stored + self.expert_biases + self.head + self.unfrozen

    @property
    def millions(self) -> float:
        """Active parameters of `adapter`, in millions: what our tables show, and the paper's but for the LayerNorm."""
        return self.adapter.active / 1e6

    def __str__(self) -> str:
        rows = [(name, count.stored, count.active) for name, count in self.kinds.items() if count.stored]
        rows.append(("adapter", self.adapter.stored, self.adapter.active))
        if norms := self.kinds["norms"].stored:
            rows.append(("adapter without norms", self.adapter.stored - norms, self.adapter.active - norms))
        if self.expert_biases:
            rows.append(("further expert biases", self.expert_biases, self.expert_biases))
        rows.append(("head", self.head, self.head))
        if self.unfrozen:
            rows.append(("backbone (unfrozen)", self.unfrozen, self.unfrozen))
        active = self.total - self.adapter.stored + self.adapter.active
        rows.append(("total", self.total, active))
        lines = [f"{'trainable parameters':<28}{'stored':>14}{'active':>14}"]
        lines += [f"{name:<28}{stored:>14,}{active:>14,}" for name, stored, active in rows]
        share = 100 * self.adapter.active / max(self.backbone, 1)
        backbone = "backbone" if self.kinds["backbone"].stored or self.unfrozen else "backbone (frozen)"
        lines.append(f"{backbone:<28}{self.backbone:>14,}    the adapter is {share:.2f} % of it")
        return "\n".join(lines)


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Counts what trains in a model with adapters, or around one; printing the result gives a table.

    What trains is what takes gradients (`requires_grad`): a head or a part of the adapters that you froze is left out.

    Raises:
        ValueError: the model has no adapters, or all are disabled.
    """
    whole, model = unwrap(model), holder_of(model)
    book = book_of(model)
    check_unrouted(book)
    if book.active is None:
        raise ValueError("model: expected an active adapter, got one within disable_adapter")
    counts = dict.fromkeys(KINDS, Count())
    expert_biases = 0
    for _, _, adapter in book.adapters(book.active):
        for kind, count in _count(adapter).items():
            counts[kind] += count
        expert_biases += _trained(adapter.up.bias) - _one_bias(adapter)
    for _, _, prompts in book.prompts(book.active):
        counts["prompts"] += _count_trained(prompts.weight)
    tuned = book.tuned_by(book.active)
    unfrozen = sum(parameter.numel() for parameter in unfrozen_parameters(model).values())
    if tuned is not None:
        beyond = set(tuned.beyond(book.configs[book.active].method))
        values = {path: model.get_parameter(path) for path in tuned.paths}
        unfrozen += sum(_trained(value) for path, value in values.items() if path in beyond)
        counts["backbone"] += _count_trained(*(value for path, value in values.items() if path not in beyond))
    head = current_head(model)
    others = sum(parameter.numel() for slot in book.slots() for parameter in slot.parameters())
    others += sum(parameter.numel() for parameter in book.parameters())
    classifier = sum(parameter.numel() for parameter in head.parameters())
    beside = {*whole.parameters()} - {*model.parameters()} | {*head.parameters()}
    head_size = sum(_trained(parameter) for parameter in beside)
    everything = sum(parameter.numel() for parameter in model.parameters())
    return TrainableParameters(counts, expert_biases, head_size, everything - others - classifier, unfrozen)


def _count(adapter: FusedMoSAAdapter) -> dict[str, Count]:
    biases = _trained(adapter.down.bias) + _one_bias(adapter)
    return {
        "down weights": _count_weight(adapter, adapter.down),
        "up weights": _count_weight(adapter, adapter.up),
        "biases": Count(biases, biases),
        "norms": _count_trained(*([] if adapter.norm is None else adapter.norm.parameters())),
        "scales": _count_trained(adapter.scale if isinstance(adapter.scale, nn.Parameter) else None),
    }


def _trained(parameter: Tensor | None) -> int:
    """Its size, if it takes gradients."""
    return parameter.numel() if parameter is not None and parameter.requires_grad else 0


def _count_trained(*parameters: Tensor | None) -> Count:
    size = sum(map(_trained, parameters))
    return Count(size, size)


def _one_bias(adapter: FusedMoSAAdapter) -> int:
    """What the up-projection's bias counts for, without those of further experts."""
    bias = adapter.up.bias
    return _trained(bias) // (len(bias) if bias is not None and bias.dim() == 2 else 1)


def _count_weight(adapter: FusedMoSAAdapter, projection: Projection) -> Count:
    stored = _trained(projection.weight)
    if not stored:
        return Count()
    kept, assignment = adapter.sampler.fixed, projection.assignment
    if kept is None or assignment is None:
        return Count(stored, stored)
    if assignment.is_meta:  # nothing to count; the first expert owns the larger share of what does not divide
        return Count(stored, -(-stored // adapter.num_experts))
    return Count(stored, int((assignment == kept).sum()))
