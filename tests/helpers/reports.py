"""Reports made up for tests, with figures chosen by hand."""

from __future__ import annotations

from typing import Any

from mosa_kernels.bench.records import FORMAT


def ms(median: float, spread: float = 0.02) -> dict[str, float]:
    low, high = median * (1 - spread), median * (1 + spread)
    return {"median": median, "p20": low, "p80": high, "smallest": median * 0.9, "runs": 5}


def row(provider: str, median: float | None, ours: bool = False, **more: Any) -> dict[str, Any]:
    """A timed row, or with None one that is not available."""
    found: dict[str, Any] = {"provider": provider, "ours": ours, "status": "ok", "reason": None}
    if median is None:
        return {**found, "status": "unavailable", "reason": "not here", **more}
    return {**found, "ms": ms(median), "error": {"worst": "out", "relative": 1e-3, "eager": 1e-3}, **more}


def record(operator: str, rows: list[dict[str, Any]], **case: Any) -> dict[str, Any]:
    key = {"shape": "vit_b, 128 x 197", "d": 768, "r": 64, "N": 4, "dtype": "bf16", "expert per": "call", "layers": 1}
    eager = next((row["ms"]["median"] for row in rows if row["provider"] == "eager" and "ms" in row), None)
    if eager is not None:
        rows = [row | {"speed_up": eager / row["ms"]["median"]} if "ms" in row else row for row in rows]
    floor = {"bytes": 10**8, "flops": 10**9, "ms": 0.03, "bound": "copying"}
    return {"operator": operator, "case": {**key, **case}, "cache": "cold", "floor": floor, "rows": rows}


def report(*kernels: dict[str, Any], device: str = "NVIDIA H200", **machine: Any) -> dict[str, Any]:
    described = {
        "device": device, "device_type": "cuda" if "NVIDIA" in device else "cpu", "cpu": "a processor, 2 core(s)",
        "cores": 2, "threads": 2, "cpu_capability": "AVX2", "compiled_cpu_kernels": "avx2",
        "compiled_cuda_kernels": "90-real", "gpu": {"name": device, "driver": "1.2"} if "NVIDIA" in device else None,
        "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "commit": "abc", "made": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return {
        "format": FORMAT, "preset": "quick", "seconds": 12.0, "machine": {**described, **machine},
        "limits": {"copy": 4000.0, "matrix": {"fp32": 50.0, "bf16": 700.0}, "known": None},
        "kernels": list(kernels), "models": [], "growth": [], "left_out": [],
    }  # fmt: skip
