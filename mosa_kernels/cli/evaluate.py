"""`mosa-kernels evaluate`: the accuracy of a trained adapter, by each inference mechanism."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mosa_kernels.cli.errors import plain_errors
from mosa_kernels.cli.opened import ANY_CLASSES, describe, open_loader, refuse_rule_without_experts
from mosa_kernels.cli.tables import table_of
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.nn.options import check_choice, check_seed
from mosa_kernels.train.evaluate import MECHANISMS, warn_of_merge_loss
from mosa_kernels.train.evaluate import evaluate as measure
from mosa_kernels.train.folder import require_own_or_new, versions, write_json
from mosa_kernels.train.saved import open_saved
from mosa_kernels.train.setup import make_accelerator


def evaluate(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved adapter.")],
    data: Annotated[str | None, typer.Option(help="As for train; by default the data of the run.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Files of a torchvision or timm data set.")] = None,
    any_classes: Annotated[bool, typer.Option("--any-classes", help=ANY_CLASSES)] = False,
    inference: Annotated[
        str, typer.Option(help=f"{', '.join(MECHANISMS)}, several with commas, or all.")
    ] = "merged,stochastic",
    rule: Annotated[str | None, typer.Option(help="mean or jigsaw; by default both.")] = None,
    split: Annotated[str, typer.Option(help="test, or validation.")] = "test",
    weights: Annotated[str | None, typer.Option(help="best or last of a run; by default what it selected.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the backbone in timm, where it is not recorded.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="File of the backbone's weights.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0)] = 0,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16, fp16.")] = "no",
    seed: Annotated[int, typer.Option(help="Of the stochastic mechanism.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Measure the accuracy of a trained adapter: merged, with random or fixed experts, or their ensemble."""
    console = Console()
    with plain_errors():
        rules = _rules(rule)
        mechanisms = _mechanisms(inference)
        check_seed("seed", seed)
        if rule is not None and "merged" not in mechanisms:
            raise ValueError(f"rule: expected together with --inference merged, got --inference {inference}")
        if seed and "stochastic" not in mechanisms:
            raise ValueError(f"seed: expected together with --inference stochastic, got --inference {inference}")
        if output is not None:
            require_own_or_new((output,), lambda record: {"split", "results"} <= record.keys(), "a file of evaluate")
        saved = open_saved(path, model=model, checkpoint=checkpoint, weights=weights)
        refuse_rule_without_experts(saved, rule)
        splits, loader = open_loader(
            saved,
            split,
            console,
            data=data,
            data_root=data_root,
            any_classes=any_classes,
            batch_size=batch_size,
            workers=workers,
        )
        accelerator = make_accelerator(dataclasses.replace(saved.settings, mixed_precision=mixed_precision, cpu=cpu))
        runner, loader = accelerator.prepare(saved.model, loader)
        results = measure(runner, loader, mechanisms, rules=rules, seed=seed, accelerator=accelerator)
        if not accelerator.is_main_process:
            return
        console.print(f"{describe(saved, path)}\n{split} of {splits.name}: {splits.note}", highlight=False)
        console.print(results_table(results, saved.settings.recipe.merge_rule))
        for each in rules:
            warning = warn_of_merge_loss(results, each)
            if warning is not None:
                console.print(f"warning: {warning}", highlight=False)
        if output is not None:
            write_json(output, _record(path, split, splits.summary(), results, seed))


def _rules(rule: str | None) -> tuple[str, ...]:
    if rule is not None:
        check_choice("rule", rule, MERGE_RULES)
    return MERGE_RULES if rule is None else (rule,)


def _mechanisms(text: str) -> tuple[str, ...]:
    chosen = MECHANISMS if text == "all" else tuple(part.strip() for part in text.split(","))
    unknown = [name for name in chosen if name not in MECHANISMS]
    if unknown:
        raise ValueError(f"inference: expected all, or some of {', '.join(MECHANISMS)}, got {', '.join(unknown)}")
    if "merged" in chosen and "stochastic" not in chosen:
        return (*chosen, "stochastic")  # a merge that loses much must not go unseen
    return chosen


def results_table(results: dict[str, dict[str, float]], rule: str) -> Table:
    """Accuracy and likelihood by mechanism."""
    rows = []
    for name, row in results.items():
        title = f"merged by {name}" if name in MERGE_RULES else name
        note = " (as configured)" if name == rule else ""
        rows.append((title + note, f"{row['accuracy']:.2f}", f"{row['nll']:.4f}"))
    return table_of(("inference", "accuracy %", "NLL"), rows)


def _record(
    path: Path, split: str, data: dict[str, Any], results: dict[str, dict[str, float]], seed: int
) -> dict[str, Any]:
    return {"path": str(path), "split": split, "data": data, "results": results, "seed": seed, "versions": versions()}
