"""The bytes that a GPU's memory really moves for a call, read from its counters by Nsight Compute.

    python benchmarks/dram_bytes.py OUT.json [--images 128] [--shape vit_b]

Counted are all kernels of one call, with whatever lies in the cache left there, beside what the formulas say. The
profiler starts a process for each provider, which says with exit status 3 that it has no such provider.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mosa_kernels.bench.adapter import OPERATORS, Adapter
from mosa_kernels.bench.shapes import Point
from mosa_kernels.train.folder import write_json

PROVIDERS = ("eager", "triton", "cuda")
MARK = "spin_kernel"  # what torch.cuda._sleep launches; ahead of each direction
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
NOT_BUILT = "not built: "
_LIMIT = 120  # seconds for one provider


def run_once(point: Point, provider: str) -> None:
    """One call of each direction after one that compiles and warms up. Exits with 3 where it cannot."""
    adapter = Adapter(point, torch.device("cuda", torch.cuda.current_device()))
    for direction in OPERATORS:
        found = next(p for p in adapter.case(direction).providers() if p.name == provider)
        if found.reason is not None:
            print(f"{NOT_BUILT}{found.reason}")
            sys.exit(3)
        prepared = found.prepare()
        prepared.run()
        torch.cuda.synchronize()
        # A range of NVTX would hold for this thread alone; autograd launches backward kernels from another one.
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        prepared.run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(f"counted {direction} {0 if prepared.work is None else prepared.work.bytes}", flush=True)


def totals(text: str) -> list[tuple[float, int]]:
    """Of each call bytes over all kernels, and how many kernels, from the profiler's CSV."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu: expected a table of metrics, got none")
    calls: list[dict[str, float]] = []  # of each the bytes by kernel
    marks: set[str] = set()
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if MARK in row["Kernel Name"]:
            if row["ID"] not in marks:
                calls.append({})
            marks.add(row["ID"])
        elif row["Metric Name"] in METRICS:
            if not calls:
                raise ValueError(f"ncu: expected the kernel {MARK} first, got {row['Kernel Name']}")
            calls[-1][row["ID"]] = calls[-1].get(row["ID"], 0.0) + float(row["Metric Value"].replace(",", ""))
    return [(sum(kernels.values()), len(kernels)) for kernels in calls]


def measure(shape: str, images: int, provider: str, ncu: str) -> list[dict[str, Any]]:
    """One provider's figures in each direction, or why there are none."""
    here = [sys.executable, __file__, "--shape", shape, "--images", str(images), "--run", provider]
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    options += ["--profile-from-start", "off", "--target-processes", "all"]
    options += ["--cache-control", "none", "--clock-control", "none"]
    rows = [{"operator": operator, "provider": provider} for operator in OPERATORS.values()]
    try:
        done = subprocess.run([ncu, *options, *here], capture_output=True, text=True, timeout=_LIMIT)
        found = totals(done.stdout)
        if len(found) != len(rows):
            raise ValueError(f"ncu: expected {len(rows)} calls, got {len(found)}")
    except subprocess.TimeoutExpired as error:
        return [{**row, "reason": str(error).splitlines()[0]} for row in rows]
    except ValueError as error:
        return [{**row, "reason": _reason(done, str(error))} for row in rows]
    counted = dict(re.findall(r"^counted (\w+) (\d+)$", done.stdout, re.MULTILINE))
    return [
        {**row, "read": read, "kernels": kernels, "counted": int(counted.get(direction, 0)) or None}
        for row, direction, (read, kernels) in zip(rows, OPERATORS, found, strict=True)
    ]


def _reason(done: subprocess.CompletedProcess[str], otherwise: str) -> str:
    """Why there is no table: what the process said, else the last that the profiler said."""
    for line in done.stdout.splitlines():
        if line.startswith(NOT_BUILT):
            return line.removeprefix(NOT_BUILT)
    if done.returncode == 3:
        return "not built"
    complaints = [line for line in done.stdout.splitlines() if line.startswith("==ERROR==")]
    said = done.stderr.strip().splitlines() or complaints
    return said[-1] if said else otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--shape", default="vit_b")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--run", metavar="PROVIDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    point = Point(options.shape, options.images, 64, 4, "bf16", "call")
    if options.run is not None:
        run_once(point, options.run)
        return
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        sys.exit("ncu (Nsight Compute) is not installed")
    if options.output is None:
        parser.error("expected a file for the figures")
    rows: list[dict[str, Any]] = []
    for provider in PROVIDERS:
        rows += measure(options.shape, options.images, provider, ncu)
        print(*rows[-len(OPERATORS) :], sep="\n", flush=True)
        write_json(options.output, {"case": point.key(), "rows": rows})  # what there is, should time run out


if __name__ == "__main__":
    main()
