"""Which backend runs a call: the first in order that can, or the one asked for by name."""

from __future__ import annotations

from types import ModuleType

import torch

from mosa_kernels.backends import cpu, reference
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.triton import backend as triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton, "reference": reference}
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ()}
"""For each device type, the fused backends in the order in which they are tried; the reference comes last.

CPU: see `_pays_off` and benchmarks/reports. CUDA: the Triton kernels pass the tests in
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
        if not _pays_off(name, args):
            continue
        if module.available()[0] and module.supports_adapter(args)[0]:
            return name
    return "reference"


_WIDE_BOTTLENECK, _LARGE_CALL = 64, 2_400_000  # r, and entries of x


def _pays_off(name: str, args: AdapterArguments) -> bool:
    """Whether a backend is the faster one for a call of this size, by measurement.

    The CPU kernels win by the memory traffic that they save. With a wide bottleneck and an x whose intermediates stay
    in the cache there is none to save, and eager PyTorch's matrix products are faster. Eager time / ours, forward and
    forward + backward, one expert per sample, fp32 | bf16 (EPYC 9004, 2 threads, 32 MB of L3 cache):

        d 768, r 64, T   788    0.67 0.77 | 0.86 0.77       d 384, r 16, T  788    1.19 1.03 | 1.46 1.33
                     T  3152    1.16 1.67 | 1.09 1.06                    T 3152    1.39 1.08 | 1.21 1.09
                     T 12608    4.60 3.11 | 2.62 1.98       d 192, r  8, T 3152    1.11 1.22 | 1.43 1.25

    A compiled graph serves every number of tokens, so it does not ask.
    """
    if name != "cpu" or torch.compiler.is_compiling():
        return True
    return args.bottleneck < _WIDE_BOTTLENECK or args.x.numel() >= _LARGE_CALL
