"""Drawing experts: stochastic activation (arXiv 2312.02923, section 3.3)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mosa_kernels.backends.arguments import MERGED
from mosa_kernels.functional.checks import check_expert_ids
from mosa_kernels.nn.options import check_choice, check_expert
from mosa_kernels.nn.streams import derived_seed, read_mark, seeded_generator

EXPERT_PER = ("sample", "batch")


class Draw(NamedTuple):
    """What one forward pass of one adapter has drawn."""

    expert: Tensor | int | None  # integer [] or [G]; None: the merged adapter
    seed: Tensor | None  # int64 [] or [G], of the dropout on the bottleneck


class ExpertSampler(nn.Module):
    """Decides, forward pass by forward pass, which expert of one adapter runs.

    In training an expert is drawn uniformly, per sample or per batch, from PyTorch's default generator of the device.
    `torch.manual_seed` makes it reproducible, checkpoints that hold the generator's state resume it, and activation
    checkpointing, which restores that state, replays the same experts and the same dropout.

    Args:
        num_experts: N.
        expert_per: "sample" draws one for each entry of the first dimension, "batch" one for the call.
        fixed: this expert always runs, in training and in evaluation (a pruned adapter).

    Attributes:
        plan: draws made beforehand that the next forward passes use, or None (see `two_pass`).
        index: the number of this adapter among those of a model, by which its draws differ from theirs in `two_pass`.
        anchored: whether the first pass of `two_pass` runs the merged adapter.
        inference: in evaluation mode, None for the merged adapter, "stochastic", or the number of an expert.
        assigned: experts that run whatever would be drawn, integers [] or one a sample, or None (see
            `experts_per_sample`).
    """

    def __init__(self, num_experts: int, expert_per: str = "sample", fixed: int | None = None) -> None:
        super().__init__()
        check_choice("expert_per", expert_per, EXPERT_PER)
        self.num_experts = num_experts
        self.expert_per = expert_per
        self.fixed = fixed
        self.plan: Draw | None = None
        self.index = 0
        self.anchored = False
        self.inference: str | int | None = None
        self.assigned: Tensor | None = None

    @property
    def chooses(self) -> bool:
        """Whether there is anything to draw."""
        return self.choices > 1

    @property
    def choices(self) -> int:
        """How many experts can run."""
        return self.num_experts if self.fixed is None else 1

    def _assigned(self, samples: int) -> Tensor | None:
        """`assigned`, where it fits the batch and the experts there are."""
        experts = self.assigned
        if experts is not None and experts.dim() and experts.shape[0] != samples:
            raise ValueError(f"experts: expected one for each of the batch's {samples} samples, got {len(experts)}")
        if experts is not None:
            check_expert_ids(experts, self.num_experts, "experts")
        return experts

    def draw(self, batch_size: int, device: torch.device, dropout: bool) -> Draw:
        """Draws for one forward pass over `batch_size` samples."""
        expert: Tensor | int | None = self.fixed
        if self.chooses:
            expert = self._assigned(batch_size)
            if expert is None:
                shape = (batch_size,) if self.expert_per == "sample" else ()
                expert = torch.randint(self.num_experts, shape, device=device)
        seed = torch.randint(2**63 - 1, (), device=device) if dropout else None
        return Draw(expert, seed)

    def draw_passes(
        self, stream: int, passes: tuple[int, ...], batch_size: int, device: torch.device, dropout: bool
    ) -> Draw:
        """Draws for passes of Eq. 6, each over an equal run of the `batch_size` samples, from a stream of their own.

        What pass h draws does not depend on whether the other one runs beside it.
        """
        samples = batch_size // len(passes)
        assigned = self._assigned(samples)
        shape = (1,) if self.expert_per == "batch" and (assigned is None or assigned.dim() == 0) else (samples,)
        experts, seeds = [], []
        for number in passes:
            generator = seeded_generator(device, derived_seed(stream, number, self.index))
            if self.anchored and number == 0:
                experts.append(torch.full(shape, MERGED, device=device))
            elif assigned is not None:
                experts.append(assigned.expand(shape))
            else:
                experts.append(torch.randint(self.num_experts, shape, device=device, generator=generator))
            seeds.append(torch.randint(2**63 - 1, (1,), device=device, generator=generator))
        expert = torch.cat(experts) if self.chooses else self.fixed
        return Draw(expert, torch.cat(seeds) if dropout else None)

    def forward(self, batch_size: int, device: torch.device, dropout: bool) -> Draw:
        """The draw that holds for this pass: planned, drawn, or what inference asks for."""
        if self.training:
            if self.plan is not None:
                return self.plan
            mark = None if torch.compiler.is_compiling() else read_mark(device)
            if mark is not None:  # activation checkpointing runs a block of `two_pass` again
                return self.draw_passes(*mark, batch_size, device, dropout)
            return self.draw(batch_size, device, dropout)
        if self.inference == "stochastic" or self.assigned is not None:
            return self.draw(batch_size, device, dropout=False)
        if isinstance(self.inference, int) and self.chooses:
            check_expert("inference", self.inference, self.num_experts)
            return Draw(self.inference, None)
        return Draw(self.fixed, None)

    def extra_repr(self) -> str:
        fixed = "" if self.fixed is None else f", fixed={self.fixed}"
        return f"num_experts={self.num_experts}, per={self.expert_per}{fixed}"


class Alternatives(nn.ModuleDict):
    """Modules by name of which some run and the others rest."""

    def running(self) -> Collection[str]:
        """The names of those that run."""
        return self.keys()


def samplers(model: nn.Module) -> list[ExpertSampler]:
    """The samplers of all adapters that run in a model, in module order; not of those at rest in `Alternatives`."""
    found = _all_samplers(model)
    resting = {
        module
        for choice in model.modules()
        if isinstance(choice, Alternatives)
        for name in choice.keys() - set(choice.running())
        for module in choice[name].modules()
    }
    return [sampler for sampler in found if sampler not in resting]


def _all_samplers(model: nn.Module) -> list[ExpertSampler]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, ExpertSampler)]


@contextmanager
def inference_experts(model: nn.Module, inference: str | int | None) -> Iterator[None]:
    """Within the context, evaluation runs these experts (Table 10): None for the merged adapter, "stochastic" for a
    random one at each pass, a number for that expert in every adapter that runs. An adapter of a single expert runs
    that, whatever the number, where others have several.

    The choice is the model's, not the thread's: whoever runs the same model in another thread at that time gets these
    experts too. Threads that choose for themselves need a copy of the model each.

    Raises:
        TypeError: neither None, nor a string, nor a whole number, or `model` is no module.
        ValueError: another string, an adapter that runs has no such expert, or none runs.
    """
    found = samplers(model)
    expected = "None, 'stochastic' or an expert's number"
    if isinstance(inference, str):
        if inference != "stochastic":
            raise ValueError(f"inference: expected {expected}, got {inference!r}")
    elif inference is not None:
        if not found:
            raise ValueError(f"model: expected adapters that run, to run expert {inference!r} of, got none")
        fewest = min((sampler.choices for sampler in found if sampler.chooses), default=1)
        check_expert("inference", inference, fewest, expected)
    with _within(_all_samplers(model), "inference", inference):
        yield


@contextmanager
def experts_per_sample(model: nn.Module, experts: Sequence[int] | Tensor | int) -> Iterator[nn.Module]:
    """Within the context each sample of a batch runs the expert that is named for it, in every adapter, in training as
    in evaluation: an expert for each task, domain or class in place of one drawn at random.

    Experts share the down-projection and own disjoint entries of the up-projection, so N tasks fit into one adapter and
    do not move each other's entries; `merge_and_unload(model, expert=n)` makes the plain adapter of one of them. Both
    passes of `two_pass` run these experts (the first of an anchored adapter runs it merged). With activation
    checkpointing the backward pass belongs into the context too, since it runs the blocks again.

    Args:
        model: with adapters of more than one expert; those that do not run are not asked.
        experts: the number of an expert for each sample, integers [B], or one for all; -1 is the merged adapter.

    Raises:
        TypeError: `experts` holds no integers, or `model` is no module.
        ValueError: an expert does not exist, `experts` is not one-dimensional, or the model has no adapters with
            experts. In the context: the batch has another size.
    """
    found = [sampler for sampler in samplers(model) if sampler.chooses]
    if not found:
        raise ValueError("model: expected adapters with more than one expert, got none")
    given: Any = experts
    if not isinstance(given, (Tensor, int, Sequence)) or isinstance(given, str):
        raise TypeError(f"experts: expected integers, got {experts!r}")
    if not isinstance(given, Tensor):
        try:
            given = torch.tensor(given, device="cpu")
        except (TypeError, ValueError) as error:  # words, or rows of different lengths
            raise TypeError(f"experts: expected integers, got {experts!r}") from error
    if given.dtype not in (torch.int64, torch.int32) and given.numel():
        raise TypeError(f"experts: expected integers, got {experts!r}")
    if given.dim() > 1:
        raise ValueError(f"experts: expected one number or one for each sample, got shape {list(given.shape)}")
    fewest = min(sampler.num_experts for sampler in found)
    check_expert_ids(given, fewest, "experts")
    own = [sampler for sampler in _all_samplers(model) if sampler.chooses]  # whichever is switched to in the context
    with _within(own, "assigned", given.to(next(model.parameters()).device, non_blocking=True)):
        yield model


@contextmanager
def _within(found: Sequence[ExpertSampler], name: str, value: object) -> Iterator[None]:
    """Within the context an attribute of these samplers has a value."""
    before = [getattr(sampler, name) for sampler in found]
    for sampler in found:
        setattr(sampler, name, value)
    try:
        yield
    finally:
        for sampler, own in zip(found, before, strict=True):
            setattr(sampler, name, own)
