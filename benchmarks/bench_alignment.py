"""The alignment loss over half the blocks of a model, forward + backward.

python benchmarks/bench_alignment.py [options of mosa-kernels bench]
pytest benchmarks/bench_alignment.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app

OPERATOR = "alignment"


def test_alignment(benchmark: Callable[..., object], run: Callable[[], object]) -> None:
    benchmark(run)


if __name__ == "__main__":
    app(["bench", "--only", OPERATOR, *sys.argv[1:]])
