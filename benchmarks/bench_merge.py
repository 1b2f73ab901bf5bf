"""Merging all adapters of a model.

python benchmarks/bench_merge.py [options of mosa-kernels bench]
pytest benchmarks/bench_merge.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app

OPERATOR = "merge"


def test_merge(benchmark: Callable[..., object], run: Callable[[], object]) -> None:
    benchmark(run)


if __name__ == "__main__":
    app(["bench", "--only", OPERATOR, *sys.argv[1:]])
