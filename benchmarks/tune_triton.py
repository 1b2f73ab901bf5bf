"""Measures the table of the Triton kernels' tile sizes anew and prints its rows: `mosa-kernels bench --tune`.

python -m benchmarks.tune_triton [--dry-run] [--bottlenecks 64] [--dtypes bf16] [--shapes vit_b]
"""

from __future__ import annotations

import sys

from mosa_kernels.cli.main import app

if __name__ == "__main__":
    app(["bench", "--tune", *sys.argv[1:]])
