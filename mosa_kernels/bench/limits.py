"""The limits of a device: how fast it copies and multiplies, measured on the spot, beside what its maker says."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from mosa_kernels.bench.case import Work
from mosa_kernels.bench.shapes import DTYPES

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}  # of each of the two buffers: far beyond any cache
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1536}
_REPEATS = 7


class Roofline(NamedTuple):
    """What the maker states, without sparsity."""

    bandwidth: float  # GB/s
    half: float | None  # TFLOP/s of fp16 and bf16 matrix products that add in fp32; None: it depends on the clocks
    single: float | None  # TFLOP/s in fp32 without matrix units
    source: str


_V100 = "NVIDIA V100 datasheet, January 2020 (fp16 only)"
_A100 = "NVIDIA A100 datasheet, June 2021 and May 2020"
_H100, _H200 = "NVIDIA H100 datasheet", "NVIDIA H200 datasheet"
_GH200 = "NVIDIA GH200 datasheet"
KNOWN: dict[str, Roofline] = {
    "V100-SXM2-16GB": Roofline(900, 125, 15.7, f"{_V100}, SXM2"),
    "V100-SXM2-32GB": Roofline(900, 125, 15.7, f"{_V100}, SXM2"),
    "V100-PCIE-16GB": Roofline(900, 112, 14, f"{_V100}, PCIe"),
    "V100-PCIE-32GB": Roofline(900, 112, 14, f"{_V100}, PCIe"),
    "V100S-PCIE-32GB": Roofline(1134, 130, 16.4, f"{_V100}, V100S PCIe"),
    "A100-SXM4-40GB": Roofline(1555, 312, 19.5, f"{_A100}, 40GB SXM"),
    "A100-PCIE-40GB": Roofline(1555, 312, 19.5, f"{_A100}, 40GB PCIe"),
    "A100-SXM4-80GB": Roofline(2039, 312, 19.5, f"{_A100}, 80GB SXM"),
    "A100 80GB PCIe": Roofline(1935, 312, 19.5, f"{_A100}, 80GB PCIe"),
    "H100 80GB HBM3": Roofline(3350, 989, 67, f"{_H100}, SXM"),
    "H100 PCIe": Roofline(2000, 756, 51, f"{_H100}, PCIe"),
    "H100 NVL": Roofline(3938, 835, 60, f"{_H100}, NVL"),
    "H200": Roofline(4800, 989, 67, f"{_H200}, SXM"),
    "H200 NVL": Roofline(4800, 835, 60, f"{_H200}, NVL"),
    "GH200 480GB": Roofline(4000, 990, 67, f"{_GH200}, 96 GB of HBM3"),
    "GH200 144G HBM3e": Roofline(4900, 990, 67, f"{_GH200}, 144 GB of HBM3e"),
    "L4": Roofline(300, 121, 30.3, "NVIDIA L4 datasheet"),
    "RTX 4090": Roofline(1008, 165, 82.6, "NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090"),
    "RTX 4090 Laptop GPU": Roofline(576, None, None, "256 bits of GDDR6 at 18 Gbit/s"),
}
"""By the whole name that the driver gives, without maker and brand: a part of it, a suffix for another board, an
instance of a part of a GPU (MIG) has other limits."""
_BRANDS = ("NVIDIA ", "Tesla ", "GeForce ")


class Limits(NamedTuple):
    """What this device was seen to do."""

    copy: float  # GB/s, bytes read plus bytes written
    matrix: dict[str, float]  # TFLOP/s by dtype

    def products(self, dtype: str) -> float | None:
        """TFLOP/s of matrix products of this dtype, also those in fp32: CPUs without units for bf16 are faster so."""
        if dtype not in self.matrix:
            return None
        return max(self.matrix[dtype], self.matrix.get("fp32", 0.0))

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time for this work: its bytes or its products, whichever takes longer."""
        rate = self.products(dtype)
        products = work.flops / (rate * 1e12) if rate else 0.0
        return max(work.bytes / (self.copy * 1e9), products)


def known_roofline(name: str) -> Roofline | None:
    """The maker's figures for a GPU of this name, or None where it is not in the table."""
    for brand in _BRANDS:
        name = name.removeprefix(brand)
    return KNOWN.get(name)


def measure_limits(device: torch.device, *, quick: bool = False) -> Limits:
    """Measures both limits, in a second or two. `quick` takes smaller sizes, for smoke tests: too low, perhaps."""
    shrink = 8 if quick else 1
    size = _COPY_BYTES[device.type] // shrink
    source = torch.randint(127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _seconds(partial(target.copy_, source), device) / 1e9
    del source, target
    side = _MATRIX_SIDE[device.type] // (4 if quick else 1)
    matrix: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        if device.type == "cpu" and dtype == torch.float16:
            continue  # PyTorch's CPU products in fp16 are far from what the processor can do
        a, b = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        out = torch.empty(side, side, device=device, dtype=dtype)
        matrix[name] = 2 * side**3 / _seconds(partial(torch.mm, a, b, out=out), device) / 1e12
    return Limits(copy, matrix)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call that is far longer than its launch."""
    run()
    run()
    times = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
