"""Whose gradient a parameter holds: the experts that ran in the passes that added to it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from mosa_kernels.nn.projection import Projection
from mosa_kernels.shards import is_sharded, local_part, local_rows


class ActivityHistory:
    """Which experts contributed to the gradient of one parameter since that was last cleared.

    Nobody says when a gradient is cleared: `model.zero_grad` knows nothing of optimizers. So each backward pass looks
    at the gradient that it is about to add to. If that is None, what was known is forgotten; if it was changed in
    place since the last pass, what was known is kept only if anything of the gradient is left; if another tensor has
    taken its place, that tells which experts it is from.

    Under FSDP2 it is None as well after passes that do not synchronise, whose gradients are elsewhere until one does.
    What was known is then forgotten only if an optimizer has used the gradient, or cleared it, in between.

    The engine calls the hooks of one pass in any order; the first of them looks. So an optimizer that steps within the
    pass, as gradients arrive, may be ahead of the report, and then the gradient itself tells.
    """

    def __init__(self, parameter: Tensor, projection: Projection, owned: Projection | None) -> None:
        assert projection.activity is not None
        leaf = projection.activity.track(parameter.device)
        self.num_experts = projection.activity.num_experts
        self._parameter = parameter
        self._owned = owned
        self._flags: Tensor | None = None  # float32 [N], never written to; None: no pass since the gradient was None
        self._read_by_graphs: list[Tensor] = []
        self._pass = -1
        self._reported = self._accumulated = False  # in this pass
        self._used = False  # by an optimizer, since what was known was last forgotten
        self._version = (-1, -1)
        self._left: TensorWeakRef | None = None  # the gradient that the last pass added to
        # The hooks must not keep a discarded optimizer alive, nor go on running for it.
        this = weakref.ref(self)
        frozen = not parameter.requires_grad  # it may thaw later, and only what is not frozen takes hooks
        parameter.requires_grad_(True)
        handles = (
            leaf.register_hook(lambda grad: _call(this, ActivityHistory._report, grad)),
            parameter.register_hook(lambda _: _call(this, ActivityHistory._look)),
            parameter.register_post_accumulate_grad_hook(lambda _: _call(this, ActivityHistory._accumulate)),
        )
        parameter.requires_grad_(not frozen)
        weakref.finalize(self, _remove, handles).atexit = False

    @property
    def owner(self) -> Tensor | None:
        return None if self._owned is None else self._owned.assignment

    def active(self) -> Tensor:
        """float32 [N], nonzero for the experts of the present gradient."""
        grad = self._parameter.grad
        report_may_come = self._accumulated and not self._reported and _current_pass() == self._pass
        if not report_may_come:
            self._settle()
        if grad is None:
            return torch.zeros(self.num_experts, dtype=torch.float32, device=self._parameter.device)
        self._used = True
        if self._replaced() or self._flags is None:
            return self._experts_of(grad)
        flags = self._flags.to(grad.device)
        return torch.maximum(flags, self._experts_of(grad)) if report_may_come else flags

    def cleared(self) -> None:
        """An optimizer clears the gradient."""
        self._used = True

    def _replaced(self) -> bool:
        return self._left is not None and self._left() is not self._parameter.grad

    def _experts_of(self, grad: Tensor) -> Tensor:
        """The experts in whose entries or rows the gradient is not zero, float32 [N]."""
        flags = torch.zeros(self.num_experts, dtype=torch.float32, device=grad.device)
        nonzero, rows = local_part(grad) != 0, slice(None)
        if is_sharded(self._parameter):
            rows = local_rows(self._parameter)
        if self.owner is None:
            flags[rows] = nonzero.any(1).float()
        else:
            flags.scatter_reduce_(0, self.owner[rows].flatten().long(), nonzero.flatten().float(), "amax")
        return flags

    def _look(self) -> None:
        current = _current_pass()
        if current == self._pass:
            return
        self._settle()
        self._pass, grad = current, self._parameter.grad
        if self._flags is not None and self._flags.is_cuda and torch.cuda.is_current_stream_capturing():
            self._read_by_graphs.append(self._flags)  # at its address, in every replay
        if grad is None:
            if self._used or not is_sharded(self._parameter):
                self._flags, self._used = None, False
        elif self._replaced():
            self._flags = self._experts_of(grad)
        elif self._flags is not None and _versions(grad) != self._version:
            # Selected, not multiplied: a replayed CUDA graph may find anything in the flags of before its capture.
            self._flags = torch.where((local_part(grad) != 0).any(), self._flags.to(grad.device), 0)
            self._version = _versions(grad)

    def _report(self, experts: Tensor) -> None:
        self._look()
        self._reported = True
        if experts.requires_grad:
            experts = experts.detach()
        self._flags = experts if self._flags is None else torch.maximum(self._flags.to(experts.device), experts)

    def _accumulate(self) -> None:
        grad = self._parameter.grad
        if grad is None:
            if self._parameter.requires_grad:  # whoever was told first has used and cleared it
                return
            raise RuntimeError(
                f"backward: expected the adapter's parameters to require gradients until it has run, got one of shape "
                f"{list(self._parameter.shape)} that no longer does, so that its gradient is lost: run backward() "
                "within adapters_per_sample, and before set_adapter switches to another adapter"
            )
        self._accumulated = True
        self._version = _versions(grad)
        self._left = TensorWeakRef(grad)

    def _settle(self) -> None:
        """A pass that added to the gradient without a report, by `backward(inputs=...)`: the gradient itself tells."""
        grad = self._parameter.grad
        if self._accumulated and not self._reported and grad is not None:
            found = self._experts_of(grad)
            self._flags = found if self._flags is None else torch.maximum(self._flags.to(grad.device), found)
        self._accumulated = self._reported = False


def _current_pass() -> int:
    """The number of the backward pass that runs on this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def _versions(grad: Tensor) -> tuple[int, int]:
    """A sharded gradient counts changes of its own apart from those of this rank's part, to which FSDP2 adds."""
    return grad._version, local_part(grad)._version


def _call(history: weakref.ref[ActivityHistory], method: Callable[..., None], *arguments: Tensor) -> None:
    alive = history()
    if alive is not None:
        method(alive, *arguments)


def _remove(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()
