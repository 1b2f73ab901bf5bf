"""The backends of an operator by name, and the one that runs a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch

from mosa_kernels.backends import measured
from mosa_kernels.backends.measured import Kind

NAMES = ("cpu", "triton", "cuda", "reference")
_VARIABLE = "MOSA_CUDA_BACKENDS"
_DEVICE_TYPES = ("cpu", "cuda")  # for which tables are measured, and backends preferred


class Backend(NamedTuple):
    """Where a backend of an operator lives. Its module is imported only where the backend is available."""

    available: Callable[[], tuple[bool, str]]
    load: Callable[[], ModuleType]


@dataclass(frozen=True)
class Operator:
    """An operator that several backends offer: `<name>` in the module of each, and `supports_<name>` of a call.

    The second says whether the backend takes a call, and if not, why; for the automatic choice and for the error alike.
    """

    name: str
    backends: Mapping[str, Backend]
    order: Mapping[str, tuple[str, ...]]  # by device type: what is tried before the reference
    pays_off: Callable[..., bool] = lambda backend, *call: True  # whether a backend of the order is the faster one
    kind: Callable[..., Kind] | None = None  # what of a call a table is asked by; None: there is no table
    exceptions: Mapping[str, str] = field(default_factory=dict)  # by device type, `pays_off` in words

    def check_name(self, backend: str | None) -> None:
        """Raises ValueError where there is no backend of this name."""
        if backend is not None and backend not in self.backends:
            raise ValueError(f"backend: expected one of {', '.join(self.backends)} or None, got {backend!r}")

    def choose(self, device_type: str, backend: str | None, *call: Any) -> str:
        """The name of the backend for a call, the arguments of which `supports_<name>` judges.

        That is the one asked for; else the first that takes the call of those preferred (`prefer_backends`), else of
        those that were measured to be faster (`measured.ranked`), else of the order; else the reference.

        Raises:
            ValueError: the backend asked for does not exist or does not take this call; the message says why.
        """
        self.check_name(backend)
        if backend is not None:
            ok, reason = self._takes(backend, call)
            if not ok:
                raise ValueError(f"backend: {backend!r} does not take this call: {reason}")
            return backend
        for name in self._candidates(device_type, call):
            if name in self.backends and self._takes(name, call)[0]:
                return name
        return "reference"

    def _candidates(self, device_type: str, call: tuple[Any, ...]) -> Sequence[str]:
        preferred = _preferred.get(device_type)
        if preferred is not None:
            return preferred
        order = self.order.get(device_type, ())
        if self.kind is not None and device_type in _DEVICE_TYPES:
            kind = self.kind(*call)
            ranked = measured.ranked(kind)
            if ranked is not None:
                return ranked
            if device_type == "cuda" and not order:
                self._tell_of_idle_kernels(kind, call)
        return [name for name in order if self.pays_off(name, *call)]

    def _tell_of_idle_kernels(self, kind: Kind, call: tuple[Any, ...]) -> None:
        # What is traced reads no variable that changes, or it would be traced again.
        if torch.compiler.is_compiling() or not measured.told:
            idle = [name for name in self.backends if name != "reference" and self._takes(name, call)[0]]
            if idle:
                measured.tell_of_idle_kernels(kind[1], ", ".join(idle))

    def run(self, backend: str, *call: Any) -> Any:
        """Runs the operator on a backend that `choose` chose."""
        return getattr(self.backends[backend].load(), self.name)(*call)

    def _takes(self, backend: str, call: tuple[Any, ...]) -> tuple[bool, str]:
        ok, reason = self.backends[backend].available()
        if not ok:
            return False, reason
        return getattr(self.backends[backend].load(), f"supports_{self.name}")(*call)


def prefer_backends(device_type: str, *names: str) -> None:
    """Has every operator try these backends first on devices of a type, in place of its own table.

    What takes no call, or does not exist for an operator, is passed over; the reference comes last. Without names the
    tables hold again. The environment variable `MOSA_CUDA_BACKENDS` (such as "triton,cuda") sets it for CUDA devices.

    Args:
        device_type: "cpu" or "cuda".
        names: any of "cpu", "triton", "cuda" and "reference".

    Raises:
        ValueError: a name or the device type is not one of these.
    """
    if device_type not in _DEVICE_TYPES:
        raise ValueError(f"device_type: expected 'cpu' or 'cuda', got {device_type!r}")
    for name in names:
        if name not in NAMES:
            raise ValueError(f"names: expected any of {', '.join(NAMES)}, got {name!r}")
    _preferred.pop(device_type, None)
    if names:
        _preferred[device_type] = names


def preferred_backends(device_type: str) -> tuple[str, ...] | None:
    """What `prefer_backends` or the environment asked for, or None."""
    return _preferred.get(device_type)


_preferred: dict[str, tuple[str, ...]] = {}
if os.environ.get(_VARIABLE):
    try:
        prefer_backends("cuda", *(name.strip() for name in os.environ[_VARIABLE].split(",")))
    except ValueError as error:
        raise ValueError(f"{_VARIABLE}: {error}") from None
