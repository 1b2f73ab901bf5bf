"""Small calls of every kernel of ours, for compute-sanitizer, under which a large one takes minutes.

    compute-sanitizer --tool memcheck python benchmarks/small_calls.py

What fails leaves the rest, unless the device takes no calls any more. Exits with 1 where no backend ran or one failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from mosa_kernels.backends.choice import available_backends
from mosa_kernels.backends.triton import configs
from mosa_kernels.bench.case import BACKENDS, Case, Provider, generator
from mosa_kernels.bench.choose_gate import is_lost
from mosa_kernels.bench.consistency import ConsistencyCase
from mosa_kernels.bench.environment import choose_device
from mosa_kernels.bench.kernels import OPERATOR_NAMES, Effort, cases
from mosa_kernels.bench.shapes import DTYPES, Point
from mosa_kernels.bench.split import SplitCase
from mosa_kernels.functional.adapter import mosa_adapter
from mosa_kernels.functional.split import split

POINTS = (
    Point("swin_b_4", 2, 8, 4, "fp32", "call"),
    Point("vit_ti", 1, 24, 3, "bf16", "call"),
    Point("swin_b_4", 3, 64, 2, "bf16", "sample"),
    Point("vit_ti", 1, 96, 4, "fp16", "call"),  # wider than a tile
)
CLASSES = 37
WIDTH, BOTTLENECK, EXPERTS, TOKENS = 200, 24, 3, 70  # no multiple of a tile
NARROW = 16
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "in columns": ("bf16", {"granularity": "column"}),
    "in columns, wide": ("fp32", {"granularity": "column", "bottleneck": 96}),
    "sparse down": ("fp16", {"down": True}),
    "dropout, a seed a sample": ("bf16", {"dropout_p": 0.3}),
}
"""Adapters that no point has: dtype, and how they are split."""

Call = tuple[str, Callable[[], object]]


def calls(device: torch.device) -> Iterator[Call]:
    """Every call of ours, by name; one that a backend declines raises its ValueError."""
    every: list[Case] = [SplitCase(POINTS[0], device), ConsistencyCase(POINTS[0], CLASSES, device)]
    for case in [*every, *cases(OPERATOR_NAMES, POINTS, device, Effort())]:
        for provider in case.providers():
            if provider.ours and provider.reason is None:
                yield f"{case.operator}, {provider.name}, {case.key}", partial(_run, provider)
    there = [name for name in BACKENDS if available_backends()[name] is True]
    for backend in there:
        for name, (dtype, options) in LAYERS.items():
            yield f"adapter {name}, {backend}, {dtype}", partial(layer, backend, DTYPES[dtype], device, **options)
    if "triton" in there:
        for dtype in DTYPES:
            yield f"adapter in one launch, triton, {dtype}", partial(one_launch, DTYPES[dtype], device)


def _run(provider: Provider) -> None:
    provider.prepare().run()


def layer(
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    granularity: str = "element",
    bottleneck: int = BOTTLENECK,
    down: bool = False,
    dropout_p: float = 0.0,
) -> None:
    """One adapter, forward and backward."""
    draws = generator()

    def leaf(*size: int) -> torch.Tensor:
        return (0.1 * torch.randn(size, generator=draws)).to(device, dtype).requires_grad_()

    x, residual = leaf(2, TOKENS, WIDTH), leaf(2, TOKENS, WIDTH)
    weights = [leaf(bottleneck, WIDTH), leaf(bottleneck), leaf(WIDTH, bottleneck), leaf(EXPERTS, WIDTH)]
    owners = split((WIDTH, bottleneck), EXPERTS, granularity, draws).to(device)
    sparse = {}
    if down:
        sparse["assignment_down"] = split((bottleneck, WIDTH), EXPERTS, granularity, draws).to(device)
        sparse["w_down_init"] = leaf(bottleneck, WIDTH).detach()
    expert = torch.tensor(1, device=device)
    dropout = {"dropout_p": dropout_p, "seed": torch.tensor([3, 2**40], device=device) if dropout_p else None}
    options = {"scale": 0.1, "residual": residual, "backend": backend, **sparse, **dropout}
    out = mosa_adapter(x, *weights, owners, expert, **options)
    torch.autograd.grad(out, [x, residual, *weights], torch.ones_like(out))


def one_launch(dtype: torch.dtype, device: torch.device) -> None:
    """Triton's backward pass over tokens and weights together, which the table of tile sizes may have switched off."""
    with patch.object(configs, "ONE_LAUNCH", NARROW):
        layer("triton", dtype, device, bottleneck=NARROW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    device = choose_device(parser.parse_args().device)
    ran, failed = 0, 0
    for name, call in calls(device):
        try:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith("backend:"):  # it declines
                continue
            print(f"failed: {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
            if is_lost(device):
                break
            continue
        print(f"ran: {name}", flush=True)
        ran += 1
    print(f"{ran} calls ran, {failed} failed")
    sys.exit(0 if ran and not failed else 1)


if __name__ == "__main__":
    main()
