"""Random entries, blocks, rows or whole units for an expert: the adapter of each, forward and both passes.

python benchmarks/bench_granularity.py [options of mosa-kernels bench]
pytest benchmarks/bench_granularity.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app

OPERATOR = "granularity"


def test_granularity(benchmark: Callable[..., object], run: Callable[[], object]) -> None:
    benchmark(run)


if __name__ == "__main__":
    app(["bench", "--only", OPERATOR, *sys.argv[1:]])
