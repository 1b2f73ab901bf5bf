"""Which backend runs a call: the first in order that can, or the one asked for by name."""

from __future__ import annotations

from types import ModuleType

from mosa_kernels.backends import cpu, reference
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton import backend as triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "reference": reference}
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ()}
"""For each device type, the fused backends in the order in which they are tried; the reference comes last.

CPU: 2 to 7 times the reference at ViT-B's shape, see benchmarks/reports. CUDA: the Triton kernels pass the tests in
Triton's interpreter and compile for sm_80 and sm_90, but have not been timed or tested on a device, so they run when
asked for by name and not by themselves.
"""
NOT_BUILT = {
    "cuda": "this version has no CUDA kernels for the adapter (merging has one)",
}


def backend_module(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        ValueError: there is no backend of this name, or it is not part of this version.
    """
    if name in NOT_BUILT:
        raise ValueError(f"backend: {name!r} is not available: {NOT_BUILT[name]}")
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {name!r}")
    return BACKENDS[name]


def available_backends() -> dict[str, bool | str]:
    """For each backend True, or the reason why it is not available on this machine."""
    found: dict[str, bool | str] = {}
    for name, module in BACKENDS.items():
        ok, reason = module.available()
        found[name] = ok or reason
    return {**found, **NOT_BUILT}


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
