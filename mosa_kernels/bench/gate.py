"""The error gate: at most twice eager PyTorch's error at the same precision and a few roundings, everywhere.

Three errors are compared: the root mean square, the largest of an entry, which a few wrong entries show in, and, for a
result that carries its input along (`x + residual + adapter(x)`), the part that points along what the call adds. Where
the result is rounded to 16 bits, a branch of a tenth of its size is lost in the noise of one entry; along a row, or
over all, the noise cancels and a wrong branch does not. A few roundings of float32 are added to what is allowed,
since eager PyTorch may happen to be exact. No speed is reported for what does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

TIMES_EAGER = 2.0
_TIMES_LARGEST = 4.0  # of one entry's error: the largest of many scatters more than their mean
_ROUNDINGS = 8  # of float32: what the order of a sum can change where eager PyTorch happens to be exact
_FEW = 32  # entries: of fewer, eager PyTorch's error is a matter of luck, and a rounding of the result is allowed
_LEAST_SHARE = 1e-5  # of what is added: in float32 a row's mean and variance, which have errors too, move all of it


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
    added: Mapping[str, Tensor] = {}  # float64, the part of an exact result that the call adds to its input
    floor: float = _ROUNDINGS * torch.finfo(torch.float32).eps  # relative error that is allowed in any case

    def check(self, found: Mapping[str, Tensor]) -> Verdict:
        """The verdict over everything that there is to find."""
        missing = [name for name in self.exact if name not in found]
        if missing:
            return Verdict(missing[0], float("inf"), 0.0, f"{missing[0]}: there is none")
        verdicts = [self._check_one(name, tensor) for name, tensor in found.items()]
        red = [verdict for verdict in verdicts if not verdict.green]
        return max(red or verdicts, key=lambda verdict: verdict.error / max(verdict.eager_error, 1e-9))

    def _check_one(self, name: str, found: Tensor) -> Verdict:
        exact, eager = self.exact[name], self.eager[name]
        if found.shape != exact.shape or found.dtype != eager.dtype:
            got, wanted = ((list(t.shape), str(t.dtype)) for t in (found, eager))
            return Verdict(name, float("inf"), 0.0, f"{name}: expected {wanted}, got {got}")
        wrong, theirs = found.double() - exact, eager.double() - exact
        size = max(_rms(exact), torch.finfo(torch.float64).tiny)
        error, eager_error = _rms(wrong) / size, _rms(theirs) / size
        eps = torch.finfo(found.dtype).eps
        floor = max(4 * self.floor, eps) if exact.numel() < _FEW else self.floor
        reason = None
        allowed = TIMES_EAGER * eager_error + floor
        allowed_entry = _TIMES_LARGEST * _largest(theirs) + floor * _largest(exact)
        if not error <= allowed:  # NaN fails
            reason = f"relative error {error:.2g}, eager PyTorch has {eager_error:.2g}, {allowed:.2g} is allowed"
        elif not (largest := _largest(wrong)) <= allowed_entry:
            reason = f"an entry is off by {largest:.2g}, with eager PyTorch's error {allowed_entry:.2g} is allowed"
        elif name in self.added:
            reason = _along(wrong, theirs, self.added[name], max(eps / 2, _LEAST_SHARE))
        if reason is None and name in self.idle and bool(found[self.idle[name]].any()):
            reason = "not exactly zero where no active expert owns it"
        return Verdict(name, error, eager_error, None if reason is None else f"{name}: {reason}")


def _along(wrong: Tensor, theirs: Tensor, added: Tensor, share: float) -> str | None:
    """Why an error [..., d] is too large along what was to be added, in a row, in a column or over all, if it is.

    A share of all that is added is allowed in any case.
    """
    ours, eager, part = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (wrong, theirs, added))  # [T, d]
    tiny = torch.finfo(torch.float64).tiny
    ways: dict[str, tuple[int, ...]] = {"a row": (1,), "a column": (0,), "the whole": (0, 1)}
    sizes = {way: part.square().sum(dims).sqrt().clamp_min(tiny) for way, dims in ways.items()}
    noise = max(float(((eager * part).sum(dims) / sizes[way]).abs().max()) for way, dims in ways.items())
    found = []
    for way, dims in ways.items():
        component = ((ours * part).sum(dims) / sizes[way]).abs()
        over = (component / (TIMES_EAGER * noise + share * sizes[way])).max()
        found.append((float(over), f"{float((component / sizes[way]).max()):.1%} along {way}"))
    times, words = max(found)
    return None if times <= 1 else f"what is added is off by {words}, {times:.1f} times what is allowed"


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
