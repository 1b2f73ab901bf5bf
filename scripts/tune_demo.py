"""Chooses the numbers of `mosa-kernels demo` on validation data, and records what was tried.

    python scripts/tune_demo.py

Each contender's learning rate and scale, and dropout where it has one, are those of the grid with the highest mean
validation accuracy over four seeds, none of which the demo itself uses; no test image is looked at. Each finished run
is written down at once, so that an interrupted search goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from mosa_kernels.data.backbone import offline_backbone_card
from mosa_kernels.train.comparison import CHOSEN, CONTENDERS, DEMO, Contender, demo_settings
from mosa_kernels.train.comparison_runs import Task, data_of, run_task
from mosa_kernels.train.folder import versions, write_json
from mosa_kernels.train.settings import INITIAL_SEED

SEEDS = (101, 102, 103, 104)
SHARED = {"base_lr": (3e-3, 1e-2, 3e-2), "scale": (1.0, 2.5)}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "linear": {"base_lr": (1e-2, 3e-2, 1e-1)},
    "adaptformer": SHARED,
    "dropout": {**SHARED, "dropout": (0.1, 0.3)},
    "dropout-two-pass": {**SHARED, "dropout": (0.1, 0.3)},
    "mosa-batch": SHARED,
    "mosa-rising": SHARED,
    "mosa-anchored": SHARED,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, default=Path("runs/tune_demo.jsonl"), help="one line a finished run")
    parser.add_argument("--out", type=Path, default=CHOSEN)
    keys = [contender.key for contender in CONTENDERS]
    parser.add_argument("--only", nargs="*", choices=keys, default=keys, help="some; the record keeps the rest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=None, help="fewer than the demo's, to try the script")
    options = parser.parse_args()
    if options.epochs is not None and options.out == CHOSEN:
        parser.error("--epochs: expected --out too, so that a trial does not replace the demo's settings")
    return options


def points(contender: Contender) -> list[dict[str, float]]:
    """The grid of one contender."""
    grid = GRIDS[contender.key]
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def identity(contender: Contender, numbers: dict[str, float], seed: int, epochs: int | None) -> dict[str, Any]:
    """What a finished run is found by: all of its settings, and the data."""
    return {
        "key": contender.key,
        "numbers": numbers,
        "settings": demo_settings(contender, numbers, seed, epochs).flat(),
        "data": data_of(seed).fingerprint,
    }


def finished(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def search(options: argparse.Namespace) -> None:
    """Runs what is not in the log yet."""
    options.log.parent.mkdir(parents=True, exist_ok=True)
    known = [json.dumps(run["identity"], sort_keys=True) for run in finished(options.log)]
    todo = [
        (contender, numbers, seed)
        for seed in SEEDS
        for contender in CONTENDERS
        if contender.key in options.only
        for numbers in points(contender)
    ]
    for number, (contender, numbers, seed) in enumerate(todo):
        which = json.loads(json.dumps(identity(contender, numbers, seed, options.epochs)))
        if json.dumps(which, sort_keys=True) in known:
            continue
        task = Task(contender, demo_settings(contender, numbers, seed, options.epochs), test=False)
        outcome = run_task((number, task))
        run = {
            "identity": which,
            "seed": seed,
            "accuracy": outcome.accuracy,
            "nll": outcome.nll,
            "seconds": outcome.seconds,
        }
        with options.log.open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(f"{number + 1}/{len(todo)} {contender.key} {numbers} seed {seed}: {outcome.accuracy:.2f} %", flush=True)


def record(options: argparse.Namespace) -> dict[str, Any]:
    """The choice and the table behind it.

    Raises:
        ValueError: a run of the grid is missing from the log, or a contender left out from the record.
    """
    known = {json.dumps(run["identity"], sort_keys=True): run for run in finished(options.log)}
    before = json.loads(options.out.read_text()) if options.out.is_file() else {"chosen": {}, "tried": []}
    chosen: dict[str, dict[str, float]] = {}
    tried: list[dict[str, Any]] = []
    for contender in CONTENDERS:
        if contender.key not in options.only:
            if contender.key not in before["chosen"]:
                raise ValueError(f"--only: {options.out} has nothing of {contender.key} yet; search for it too")
            chosen[contender.key] = before["chosen"][contender.key]
            tried += [row for row in before["tried"] if row["method"] == contender.key]
            continue
        rows = []
        for numbers in points(contender):
            keys = [json.dumps(identity(contender, numbers, seed, options.epochs), sort_keys=True) for seed in SEEDS]
            if any(key not in known for key in keys):
                raise ValueError(f"{options.log}: runs of {contender.key} {numbers} are missing; search first")
            runs = [known[key] for key in keys]
            rows.append(
                {
                    "method": contender.key,
                    **numbers,
                    "accuracy": round(statistics.fmean(run["accuracy"] for run in runs), 3),
                    "accuracy_spread": round(statistics.stdev(run["accuracy"] for run in runs), 3),
                    "nll": round(statistics.fmean(run["nll"] for run in runs), 4),
                }
            )
        best = max(rows, key=lambda row: row["accuracy"])
        chosen[contender.key] = {name: best[name] for name in GRIDS[contender.key]}
        tried += rows
    return {
        "chosen": chosen,
        "protocol": (
            f"highest mean validation accuracy (1000 images) after the last epoch, over data seeds {list(SEEDS)} with "
            f"initial seeds {INITIAL_SEED} higher; the demo's own seeds and the test images were not looked at"
        ),
        "tried": tried,
        # Runs outside the grids, and what has to be said of how the choice came about.
        **{name: before[name] for name in ("explored", "history") if name in before},
        "recipe": DEMO.as_dict(),
        "backbone_sha256": offline_backbone_card()["sha256"],
        "command": "python scripts/tune_demo.py",
        "versions": versions(),
    }


def main() -> int:
    options = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    torch.set_num_threads(options.threads)
    search(options)
    write_json(options.out, record(options))
    print(json.dumps(json.loads(options.out.read_text())["chosen"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
