"""Small calls of every kernel of ours, for compute-sanitizer, under which a large one takes minutes.

    compute-sanitizer --tool memcheck python benchmarks/small_calls.py

Exits with 1 where no backend ran or one failed.
"""

from __future__ import annotations

import argparse
import sys

import torch

from mosa_kernels.bench.environment import choose_device
from mosa_kernels.bench.kernels import OPERATOR_NAMES, Effort, cases
from mosa_kernels.bench.shapes import Point

POINTS = (
    Point("swin_b_4", 2, 8, 4, "fp32", "call"),
    Point("vit_ti", 1, 24, 3, "bf16", "call"),
    Point("swin_b_4", 3, 64, 2, "bf16", "sample"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    device = choose_device(parser.parse_args().device)
    ran, failed = 0, 0
    for case in cases(OPERATOR_NAMES, POINTS, device, Effort()):
        for provider in case.providers():
            if not provider.ours or provider.reason is not None:
                continue
            name = f"{case.operator}, {provider.name}, {case.key}"
            try:
                provider.prepare().run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except ValueError as error:
                if not str(error).startswith("backend:"):  # a backend that declines says so
                    print(f"failed: {name}: {error}")
                    failed += 1
                continue
            print(f"ran: {name}", flush=True)
            ran += 1
    print(f"{ran} calls ran, {failed} failed")
    sys.exit(0 if ran and not failed else 1)


if __name__ == "__main__":
    main()
