"""How time and memory grow with tokens, bottleneck, experts and adapters.

python benchmarks/bench_growth.py [options of mosa-kernels bench]
"""

from __future__ import annotations

import sys

from mosa_kernels.cli.main import app

if __name__ == "__main__":
    app(["bench", "--only", "growth", *sys.argv[1:]])
