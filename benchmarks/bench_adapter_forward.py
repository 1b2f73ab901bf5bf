"""The adapter's forward pass: eager, compiled, N dense copies, every fused backend, merged.

python benchmarks/bench_adapter_forward.py [options of mosa-kernels bench]
pytest benchmarks/bench_adapter_forward.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app

OPERATOR = "adapter_forward"


def test_adapter_forward(benchmark: Callable[..., object], run: Callable[[], object]) -> None:
    benchmark(run)


if __name__ == "__main__":
    app(["bench", "--only", OPERATOR, *sys.argv[1:]])
