"""The adapter on the CPU against eager PyTorch, pair by pair.

    python benchmarks/bench_adapter.py [--quick]     a table, and the machine it was measured on
    pytest benchmarks/bench_adapter.py               the same calls under pytest-benchmark

Both sides of a pair run in turn, so that whatever else the machine does hits both alike. Ratios are of medians; the
smallest times stand beside them. `--processor-time` measures the time on the processor with one thread, which other
programs hardly disturb.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mosa_kernels import mosa_adapter, split
from mosa_kernels._extension import extension
from mosa_kernels.train.folder import machine


class Shape(NamedTuple):
    images: int
    tokens: int
    width: int
    bottleneck: int


VIT_B = Shape(64, 197, 768, 64)
SHAPES = (VIT_B, Shape(1, 197, 768, 64), Shape(1, 197, 384, 16), Shape(1, 197, 192, 8))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_EXPERTS = 4


def make_calls(
    shape: Shape, dtype: torch.dtype, per_sample: bool, backend: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass without gradients, and forward + backward with all of them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(size, generator=generator)).to(dtype)

    d, r = shape.width, shape.bottleneck
    x, residual = (normal(shape.images, shape.tokens, d).requires_grad_() for _ in range(2))
    w_down, b_down, w_up, b_up, gamma, beta = (
        parameter.requires_grad_()
        for parameter in (
            normal(r, d, gain=d**-0.5),
            normal(r, gain=0.1),
            normal(d, r, gain=r**-0.5),
            normal(NUM_EXPERTS, d, gain=0.1),
            1 + normal(d, gain=0.1),
            normal(d, gain=0.1),
        )
    )
    assignment = split((d, r), num_experts=NUM_EXPERTS, generator=generator)
    expert = torch.randint(NUM_EXPERTS, (shape.images,), generator=generator) if per_sample else 1
    grad_out = normal(shape.images, shape.tokens, d)
    leaves = (x, residual, w_down, b_down, w_up, b_up, gamma, beta)

    def call() -> Tensor:
        return mosa_adapter(
            x,
            w_down,
            b_down,
            w_up,
            b_up,
            assignment,
            expert,
            norm_weight=gamma,
            norm_bias=beta,
            scale=0.1,
            residual=residual,
            backend=backend,
        )

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), leaves, grad_out)

    return forward, both


def measure_pair(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Milliseconds of each repeat, in turn. A repeat of a short call is the mean of several."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        ours()
        theirs()
    start = clock()
    theirs()
    inner = max(1, min(20, int(0.005 / max(clock() - start, 1e-6))))
    for _ in range(repeats):
        for into, run in zip(times, (ours, theirs), strict=True):
            start = clock()
            for _ in range(inner):
                run()
            into.append((clock() - start) / inner * 1e3)
    return times


def described_machine() -> str:
    module = extension().module
    compiled = extension().reason or ", ".join(module.adapter_cpu_instruction_sets())  # type: ignore[union-attr]
    return (
        f"{machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}); compiled kernels: {compiled}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the ViT-B shape alone")
    parser.add_argument("--processor-time", action="store_true", help="one thread, time on the processor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1 if options.processor_time else options.threads)
    clock = time.thread_time if options.processor_time else time.perf_counter
    print(described_machine())
    print("| shape | dtype | expert | pass | cpu ms (min) | eager ms (min) | ratio |\n|---|---|---|---|---|---|---|")
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for dtype_name, dtype in DTYPES.items():
            for per_sample in (False, True) if shape.images > 1 else (False,):
                pairs = zip(*(make_calls(shape, dtype, per_sample, name) for name in ("cpu", "reference")), strict=True)
                for name, (ours, theirs) in zip(("forward", "forward + backward"), pairs, strict=True):
                    a, b = measure_pair(ours, theirs, options.repeats, clock)
                    row = (
                        f"{shape.images} x {shape.tokens}, d {shape.width}, r {shape.bottleneck}",
                        dtype_name,
                        "sample" if per_sample else "call",
                        name,
                        f"{statistics.median(a):.2f} ({min(a):.2f})",
                        f"{statistics.median(b):.2f} ({min(b):.2f})",
                        f"{statistics.median(b) / statistics.median(a):.2f} ({min(b) / min(a):.2f})",
                    )
                    print("| " + " | ".join(row) + " |", flush=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_adapter(benchmark: Callable[..., object], shape: Shape, dtype: str, direction: str, backend: str) -> None:
    forward, both = make_calls(shape, DTYPES[dtype], shape.images > 1, backend)
    benchmark(forward if direction == "forward" else both)


if __name__ == "__main__":
    main()
