"""Which backend runs a call: the first in order that can, or the one asked for by name."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from mosa_kernels.backends.arguments import AdapterArguments

MODULES = {
    "cpu": "mosa_kernels.backends.cpu",
    "reference": "mosa_kernels.backends.reference",
}
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",)}
"""For each device type, the fused backends in the order in which they are tried; the reference comes last."""


@cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        ValueError: no backend has this name.
    """
    if name not in MODULES:
        raise ValueError(f"backend: expected one of {', '.join(MODULES)} or None, got {name!r}")
    return importlib.import_module(MODULES[name])


def available_backends() -> dict[str, bool | str]:
    """For each backend True, or the reason why it is not available on this machine."""
    found: dict[str, bool | str] = {}
    for name in MODULES:
        ok, reason = backend_module(name).available()
        found[name] = ok or reason
    return found


def choose_adapter_backend(args: AdapterArguments, backend: str | None = None) -> str:
    """The name of the backend for this call.

    Raises:
        ValueError: the backend asked for does not exist or does not take this call; the message says why.
    """
    if backend is not None:
        module = backend_module(backend)
        ok, reason = module.available()
        if ok:
            ok, reason = module.supports_adapter(args)
        if not ok:
            raise ValueError(f"backend: {backend!r} does not take this call: {reason}")
        return backend
    for name in ORDER.get(args.x.device.type, ()):
        module = backend_module(name)
        if module.available()[0] and module.supports_adapter(args)[0]:
            return name
    return "reference"
