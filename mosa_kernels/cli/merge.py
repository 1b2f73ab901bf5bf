"""`mosa-kernels merge`: from a trained MoSA to a dense model, after checking that nothing changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mosa_kernels.cli.errors import MendableError, plain_errors
from mosa_kernels.cli.opened import ANY_CLASSES, describe, open_loader, refuse_rule_without_experts
from mosa_kernels.cli.tables import table_of
from mosa_kernels.data.transforms import evaluation_config
from mosa_kernels.nn.adapter import MERGE_RULES
from mosa_kernels.nn.options import check_choice
from mosa_kernels.peft.book import find_book
from mosa_kernels.train.backbones import data_config
from mosa_kernels.train.evaluate import evaluate, warn_of_merge_loss
from mosa_kernels.train.exporting import SUFFIX, export_program, write_program
from mosa_kernels.train.merging import (
    PROGRAM,
    SUFFIXES,
    MergeCheck,
    check_merge,
    merged_card,
    merged_copy,
    random_images,
    require_merged_or_new,
    write_merged,
)
from mosa_kernels.train.saved import Saved, open_saved

# Of the options that are for data.
USUAL: dict[str, Any] = {
    "data_root": None,
    "any_classes": False,
    "split": "validation",
    "batch_size": 256,
    "workers": 0,
}


def merge(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved adapter.")],
    output: Annotated[
        Path,
        typer.Option(
            help=".safetensors: weights, for `load_merged` of this package. .pt2: a program of torch.export, which "
            "needs PyTorch alone. A .json file beside it names its outputs."
        ),
    ],
    rule: Annotated[str | None, typer.Option(help="mean or jigsaw; by default as configured.")] = None,
    data: Annotated[str | None, typer.Option(help="Also compare accuracies on these data.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Files of a torchvision or timm data set.")] = None,
    any_classes: Annotated[bool, typer.Option("--any-classes", help=ANY_CLASSES)] = False,
    split: Annotated[str, typer.Option(help="validation, or test.")] = USUAL["split"],
    weights: Annotated[str | None, typer.Option(help="best or last of a run; by default what it selected.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the backbone in timm, where it is not recorded.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="File of the backbone's weights.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = USUAL["batch_size"],
    workers: Annotated[int, typer.Option(min=0)] = USUAL["workers"],
) -> None:
    """Merge a trained MoSA into dense adapters, as weights or as a program that needs nothing of this package."""
    console = Console()
    with plain_errors():
        if output.suffix not in SUFFIXES:
            raise ValueError(f"output: expected a file ending in {' or '.join(SUFFIXES)}, got {output.name}")
        if rule is not None:
            check_choice("rule", rule, MERGE_RULES)
        given = {"data_root": data_root, "any_classes": any_classes, "split": split}
        _refuse_without_data(data, {**given, "batch_size": batch_size, "workers": workers})
        require_merged_or_new(output)
        saved = open_saved(path, model=model, checkpoint=checkpoint, weights=weights)
        book = find_book(saved.model)
        if book is None or book.active is None:
            raise ValueError(f"{path}: it holds the head of a linear probe; there is nothing to merge")
        refuse_rule_without_experts(saved, rule)
        chosen = rule or book.configs[book.active].merge_rule
        config = data_config(saved.model, saved.settings.image_size)
        loader: Iterable[Any] = random_images(config["input_size"])
        if data is not None:
            _, loader = open_loader(
                saved,
                split,
                console,
                data=data,
                data_root=data_root,
                any_classes=any_classes,
                batch_size=batch_size,
                workers=workers,
            )
        merged = merged_copy(saved.model, chosen)
        check = check_merge(saved.model, merged, list(loader) if data is None else loader, chosen)
        console.print(f"{describe(saved, path)}, merged by {chosen}\n{check.sentence()}", highlight=False)
        if data is not None:
            _compare(saved, loader, check, chosen, split, console)
        if not check.unchanged:
            raise MendableError("the merged model does not compute what the adapters do; nothing was written")
        card = merged_card(saved.model, saved.settings, saved.num_classes, chosen, check, saved.class_names)
        shown = saved.normalisation or evaluation_config(config, saved.settings.recipe.augment, in_memory=False)
        card |= {"from": str(path), "normalisation": shown}
        if output.suffix == SUFFIX:
            program = export_program(merged, config["input_size"])
            write_program(program, output, {**card, "kind": PROGRAM})
        else:
            write_merged(merged, output, card)
        size = output.stat().st_size / 2**20
        console.print(f"wrote {output} ({size:.1f} MiB) and {output.with_suffix('.json')}", highlight=False)


def _refuse_without_data(data: str | None, given: dict[str, Any]) -> None:
    unheeded = [name for name, value in given.items() if value != USUAL[name]]
    if data is None and unheeded:
        raise ValueError(f"{', '.join(unheeded)}: expected together with --data, which says what to compare on")


def _compare(saved: Saved, loader: Iterable[Any], check: MergeCheck, rule: str, split: str, console: Console) -> None:
    results = evaluate(saved.model, loader, ("stochastic",))
    rows = {f"adapters, evaluation mode ({rule})": check.before.as_dict(), "merged, plain": check.after.as_dict()}
    if "stochastic" in results:
        rows["adapters, stochastic"] = results["stochastic"]
    shown = [(name, f"{row['accuracy']:.2f}", f"{row['nll']:.4f}") for name, row in rows.items()]
    console.print(table_of(("model", "accuracy %", "NLL"), shown, f"{split} images"))
    warning = warn_of_merge_loss({**results, rule: check.after.as_dict()}, rule)
    if warning is not None:
        console.print(f"warning: {warning}", highlight=False)
