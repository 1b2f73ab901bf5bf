"""The adapter's backward pass, all gradients.

python benchmarks/bench_adapter_backward.py [options of mosa-kernels bench]
pytest benchmarks/bench_adapter_backward.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app

OPERATOR = "adapter_backward"


def test_adapter_backward(benchmark: Callable[..., object], run: Callable[[], object]) -> None:
    benchmark(run)


if __name__ == "__main__":
    app(["bench", "--only", OPERATOR, *sys.argv[1:]])
