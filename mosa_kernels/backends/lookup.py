"""The backends of an operator by name, and the one that runs a call: what `choice` is for the adapter itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple


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

    def check_name(self, backend: str | None) -> None:
        """Raises ValueError where there is no backend of this name."""
        if backend is not None and backend not in self.backends:
            raise ValueError(f"backend: expected one of {', '.join(self.backends)} or None, got {backend!r}")

    def choose(self, device_type: str, backend: str | None, *call: Any) -> str:
        """The name of the backend for a call, the arguments of which `supports_<name>` judges.

        Raises:
            ValueError: the backend asked for does not exist or does not take this call; the message says why.
        """
        self.check_name(backend)
        if backend is not None:
            ok, reason = self._takes(backend, call)
            if not ok:
                raise ValueError(f"backend: {backend!r} does not take this call: {reason}")
            return backend
        for name in self.order.get(device_type, ()):
            if self._takes(name, call)[0]:
                return name
        return "reference"

    def run(self, backend: str, *call: Any) -> Any:
        """Runs the operator on a backend that `choose` chose."""
        return getattr(self.backends[backend].load(), self.name)(*call)

    def _takes(self, backend: str, call: tuple[Any, ...]) -> tuple[bool, str]:
        ok, reason = self.backends[backend].available()
        if not ok:
            return False, reason
        return getattr(self.backends[backend].load(), f"supports_{self.name}")(*call)
