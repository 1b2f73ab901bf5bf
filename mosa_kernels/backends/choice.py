"""Which backend runs the adapter: the one asked for by name, else the fastest that can."""

from __future__ import annotations

from types import ModuleType

import torch

from mosa_kernels.backends import cpu, reference
from mosa_kernels.backends.arguments import AdapterArguments, has_gradients
from mosa_kernels.backends.cuda import backend as cuda
from mosa_kernels.backends.lookup import Backend, Operator, preferred_backends
from mosa_kernels.backends.measured import Kind
from mosa_kernels.backends.triton import backend as triton

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


def _kind(args: AdapterArguments) -> Kind:
    """With gradients, a backend is chosen for both passes."""
    x = args.x
    r, d = args.w_down.shape
    name = "adapter" if torch.is_grad_enabled() and has_gradients(args) else "adapter_forward"
    return name, x.device, args.compute_dtype or x.dtype, d, r, x.numel() // (d or 1)


ADAPTER = Operator(
    "adapter",
    {
        "cpu": Backend(cpu.available, lambda: cpu),
        "triton": Backend(triton.available, lambda: triton),
        "cuda": Backend(cuda.available, lambda: cuda),
        "reference": Backend(reference.available, lambda: reference),
    },
    {"cpu": ("cpu",)},
    _pays_off,
    _kind,
    {"cpu": f"in eager mode reference where r >= {_WIDE_BOTTLENECK} and x has fewer than {_LARGE_CALL:,} entries"},
)
"""What holds where no table of the device was measured (`backends.measured`). CPU: `_pays_off` and benchmarks/reports.

CUDA: the kernels of both languages pass their tests on the host, in Triton's interpreter and behind a stand-in for the
CUDA runtime, and compile for what they serve. No GPU has run or timed them yet, so on a CUDA device without a table
every operator runs its definition, and says so once.
"""


def backend_module(name: str) -> ModuleType:
    """The module of a backend that `choose_adapter_backend` chose."""
    return ADAPTER.backends[name].load()


def available_backends() -> dict[str, bool | str]:
    """For each backend True, or the reason why it is not available on this machine."""
    found: dict[str, bool | str] = {}
    for name, backend in ADAPTER.backends.items():
        ok, reason = backend.available()
        found[name] = ok or reason
    return found


def automatic_backends(device_type: str) -> tuple[str, ...]:
    """What is tried, in order, for a call of the adapter on such a device that names no backend."""
    order = preferred_backends(device_type) or ADAPTER.order.get(device_type, ())
    usable = tuple(name for name in order if ADAPTER.backends[name].available()[0] and name != "reference")
    return (*usable, "reference")


def choose_adapter_backend(args: AdapterArguments, backend: str | None = None) -> str:
    """The name of the backend for this call.

    Raises:
        ValueError: the backend asked for does not exist or does not take this call; the message says why.
    """
    return ADAPTER.choose(args.x.device.type, backend, args)
