"""The bytes that a GPU's memory really moves for a call, read from its counters by Nsight Compute.

    python benchmarks/dram_bytes.py OUT.json [--images 128] [--shape vit_b]

Counted are all kernels of one call, with whatever lies in the cache left there, beside what the formulas say.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mosa_kernels.bench.adapter import OPERATORS, Adapter
from mosa_kernels.bench.shapes import Point
from mosa_kernels.train.folder import write_json

PROVIDERS = ("eager", "triton", "cuda")
RANGE = "measured"
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_LIMIT = 120  # seconds for one provider


def run_once(point: Point, direction: str, provider: str) -> None:
    """The call after one that compiles and warms up, in a range that the profiler looks at. Exits with 3 without it."""
    case = Adapter(point, torch.device("cuda", torch.cuda.current_device())).case(direction)
    found = next(p for p in case.providers() if p.name == provider)
    if found.reason is not None:
        print(found.reason)
        sys.exit(3)
    prepared = found.prepare()
    prepared.run()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push(RANGE)
    prepared.run()
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_pop()
    print(f"counted {0 if prepared.work is None else prepared.work.bytes}")


def total(text: str) -> tuple[float, int]:
    """Bytes over all kernels, and how many kernels, from the profiler's CSV."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu: expected a table of metrics, got none")
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))) if row["Metric Name"] in METRICS]
    return sum(float(row["Metric Value"].replace(",", "")) for row in rows), len({row["ID"] for row in rows})


def measure(shape: str, images: int, direction: str, provider: str, ncu: str) -> dict[str, Any]:
    """One provider's figures, or why there are none."""
    here = [sys.executable, __file__, "--shape", shape, "--images", str(images), "--run", direction, provider]
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    options += ["--nvtx", "--nvtx-include", f"{RANGE}/", "--target-processes", "all"]
    options += ["--cache-control", "none", "--clock-control", "none"]
    row: dict[str, Any] = {"operator": OPERATORS[direction], "provider": provider}
    try:
        done = subprocess.run([ncu, *options, *here], capture_output=True, text=True, timeout=_LIMIT)
        read, kernels = total(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        return {**row, "reason": str(error).splitlines()[0]}
    counted = next((int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("counted ")), 0)
    return {**row, "read": read, "kernels": kernels, "counted": counted or None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--shape", default="vit_b")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--run", nargs=2, metavar=("DIRECTION", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    point = Point(options.shape, options.images, 64, 4, "bf16", "call")
    if options.run is not None:
        run_once(point, *options.run)
        return
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        sys.exit("ncu (Nsight Compute) is not installed")
    if options.output is None:
        parser.error("expected a file for the figures")
    rows: list[dict[str, Any]] = []
    for direction, provider in product(OPERATORS, PROVIDERS):
        rows.append(measure(options.shape, options.images, direction, provider, ncu))
        print(rows[-1], flush=True)
        write_json(options.output, {"case": point.key(), "rows": rows})  # what there is, should time run out


if __name__ == "__main__":
    main()
