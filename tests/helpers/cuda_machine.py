"""Where tests of the adapter's CUDA kernels run them: compiled for the host, and on a GPU where there is one."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from types import ModuleType

import cuda_on_host
import pytest
import torch
from accuracy import Expected, all_needs, on
from poison import poisoned_memory
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.cuda import adapter, backend

UNITS = ("adapter_forward*.cu", "adapter_backward*.cu", "adapter_listed*.cu")
MULTIPROCESSORS = 8  # on the host, so that the weight gradients come in several parts
needs_compiler = pytest.mark.skipif(cuda_on_host.find_compiler() is None, reason="no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Changes = Mapping[str, tuple[str, str]]

TWO_RANKS: Changes = {
    "adapter_launch.h": (
        """    case 32:
      return launch.template at<32>();
    case 64:
      return launch.template at<64>();
    case 128:
      return launch.template at<128>();
""",
        """    case 64:
      return launch.template at<64>();
""",
    ),
    "adapter_plain.h": (
        """    if constexpr (kProducts != kFloat32) {
      if (typed(kProducts, kFloat32)) return launch(PlainParams<E, float>(p));
      if (typed(kFloat32, kFloat32)) return launch(PlainParams<float, float>(p));
    }
""",
        "",
    ),
    "adapter_served.h": (
        "p.owned.listed == kFewListed ? launch.template at<kFewListed>() : launch.template at<kMostListed>()",
        "launch.template at<kMostListed>()",
    ),
}
"""Without the kernels of two of the padded ranks, 64 and 256 being left, and those of plain calls with tensors of two
types: half the time to compile."""


class Machine:
    """Where the kernels run."""

    def __init__(
        self, device: str, changes: Changes | None = None, has_bfloat16: bool = True, watch: str | None = None
    ) -> None:
        self.device, self.changes, self.has_bfloat16, self.watch = device, changes, has_bfloat16, watch

    def launch(self) -> adapter.Launch:
        if self.device == "cuda":
            return backend._launch_on(torch.device("cuda", torch.cuda.current_device()))
        return adapter.Launch(self._built, 0, 0, MULTIPROCESSORS, self.has_bfloat16)

    @functools.cached_property
    def _built(self) -> ModuleType:
        return cuda_on_host.build("adapter_cuda", self.changes, watch=self.watch, units=UNITS)

    def run(
        self, args: AdapterArguments, grad_out: Tensor, needs: AdapterNeeds | None = None
    ) -> tuple[Tensor, AdapterGradients]:
        ok, reason = backend.takes(args)
        assert ok, reason
        launch = self.launch()
        tokens = args.x.numel() // args.width if args.norm_weight is not None else 0
        with poisoned_memory():
            out, mean, rstd = adapter.adapter_forward(args, launch)
            assert out.is_contiguous()
            assert mean.shape == rstd.shape == (tokens,)
            gradients = adapter.adapter_backward(args, grad_out, mean, rstd, needs or all_needs(args), launch)
        return out, gradients

    def check(self, args: AdapterArguments, grad_out: Tensor | None = None) -> AdapterGradients:
        args = on(args, self.device)
        if grad_out is None:
            generator = torch.Generator().manual_seed(1)
            grad_out = torch.randn(args.x.shape, generator=generator).to(args.x)
        expected = Expected(args, grad_out)
        out, gradients = self.run(args, grad_out)
        expected.check_out(out)
        expected.check_gradients(gradients)
        if args.activity is not None:
            assert gradients.activity is not None
            assert torch.equal(gradients.activity, expert_activity(args))
        return gradients


def check_only_experts_that_ran(args: AdapterArguments, gradients: AdapterGradients, ids: Collection[int]) -> None:
    """The entries and biases of experts that ran have gradients of a magnitude, those of others are exactly zero."""
    assert gradients.w_up is not None
    assert gradients.b_up is not None
    assert args.assignment is not None
    w_up, b_up = gradients.w_up.cpu(), gradients.b_up.cpu()
    for n in range(4):
        ran = n in ids or -1 in ids
        for found in (b_up[n], w_up[args.assignment == n]):
            assert (found.abs().mean() > 1e-3) if ran else not found.any()


HOST = pytest.param(Machine("cpu"), id="cuda_on_host", marks=needs_compiler)
GPU = pytest.param(Machine("cuda"), id="gpu", marks=[pytest.mark.gpu, needs_gpu])
on_machines = pytest.mark.parametrize("machine", [HOST, GPU])


def tensors_of(out: Tensor, gradients: AdapterGradients) -> list[Tensor]:
    return [out, *(gradient for gradient in gradients if gradient is not None)]
