"""The error gate: at most twice the error of eager PyTorch at the same precision, for every output and gradient.

No speed is reported for what does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

TIMES_EAGER = 2.0
_ROUNDINGS = 8  # of float32: what the order of a sum can change where eager PyTorch happens to be exact


class Verdict(NamedTuple):
    """The output or gradient that is furthest off, as root mean squares relative to the exact value's."""

    name: str
    error: float
    eager_error: float
    reason: str | None  # None: the gate is open

    @property
    def green(self) -> bool:
        return self.reason is None


class Expected(NamedTuple):
    """What a call has to give."""

    exact: dict[str, Tensor]  # float64
    eager: dict[str, Tensor]  # the definition at the precision of the call
    idle: dict[str, Tensor]  # bool, where a gradient has to be exactly zero

    def check(self, found: Mapping[str, Tensor]) -> Verdict:
        """The verdict over everything that `found` holds."""
        verdicts = [self._check_one(name, tensor) for name, tensor in found.items()]
        red = [verdict for verdict in verdicts if not verdict.green]
        return max(red or verdicts, key=lambda verdict: verdict.error / max(verdict.eager_error, 1e-9))

    def _check_one(self, name: str, found: Tensor) -> Verdict:
        exact, eager = self.exact[name], self.eager[name]
        if found.shape != exact.shape or found.dtype != eager.dtype:
            got, wanted = ((list(t.shape), str(t.dtype)) for t in (found, eager))
            return Verdict(name, float("inf"), 0.0, f"{name}: expected {wanted}, got {got}")
        size = max(_rms(exact), torch.finfo(torch.float64).tiny)
        error, eager_error = _rms(found.double() - exact) / size, _rms(eager.double() - exact) / size
        reason = None
        if not error <= TIMES_EAGER * eager_error + _ROUNDINGS * torch.finfo(torch.float32).eps:  # NaN fails
            reason = f"{name}: relative error {error:.2g}, eager PyTorch has {eager_error:.2g}"
        elif name in self.idle and bool(found[self.idle[name]].any()):
            reason = f"{name}: not exactly zero where no active expert owns it"
        return Verdict(name, error, eager_error, reason)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
