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


_WIDE_BOTTLENECK, _LARGE_CALL = 192, 2_400_000  # r, and entries of x


def _pays_off(name: str, args: AdapterArguments) -> bool:
    """Whether a backend is the faster one for a call of this size, by measurement.

    The CPU kernels win by the memory traffic that they save. With a very wide bottleneck and an x whose intermediates
    stay in the cache there is little to save, and they recompute in backward what eager PyTorch keeps. Eager time /
    ours, forward and forward + backward, an expert per sample, fp32 | bf16 (EPYC 9004, 2 threads, 32 MB of L3 cache):

        d 768, r 256, T   197    1.17 0.88 | 1.19 0.93       d 768, r 128, T   197    1.28 1.03 | 1.28 1.01
                      T  1576    1.43 0.82 | 1.37 0.84                     T   788    1.77 1.18 | 1.68 1.28
                      T  6304    2.38 1.47 | 1.88 1.45       d 768, r  64, T   197    1.57 1.15 | 1.51 1.15
        d 768, r 192, T   788    1.09 1.03 | 0.96 0.95                     T   788    1.55 1.31 | 1.88 1.37

    A compiled graph serves every number of tokens, so it does not ask.
    """
    if name != "cpu" or torch.compiler.is_compiling():
        return True
    return args.bottleneck < _WIDE_BOTTLENECK or args.x.numel() >= _LARGE_CALL
