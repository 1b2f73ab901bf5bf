"""A training step with two passes, and inference: MoSA fused and as N copies, AdaptFormer, LoRA, the backbone alone.

python benchmarks/bench_model.py --models vit_base_patch16_224,swin_base_patch4_window7_224 --batch 64
pytest benchmarks/bench_model.py --benchmark-only
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from mosa_kernels.cli.main import app


def test_model(benchmark: Callable[..., object], step: Callable[[], object]) -> None:
    benchmark(step)


if __name__ == "__main__":
    app(["bench", "--only", "model", *sys.argv[1:]])
