"""`mosa-kernels tsne`: the features of trained models side by side, as in Figure 4 of the paper."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mosa_kernels.cli.errors import plain_errors
from mosa_kernels.cli.opened import ANY_CLASSES, open_loader
from mosa_kernels.cli.tables import table_of
from mosa_kernels.train.embedding import NEIGHBOURS, draw_embeddings, embed
from mosa_kernels.train.folder import require_own_or_new, versions, write_json
from mosa_kernels.train.saved import open_saved
from mosa_kernels.train.setup import make_accelerator


def tsne(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of saved adapters.")],
    output: Annotated[Path, typer.Option(help="PNG file; the figures go to a JSON file beside it.")],
    data: Annotated[str | None, typer.Option(help="As for train; by default the data of each run.")] = None,
    data_root: Annotated[str | None, typer.Option(help="Files of a torchvision or timm data set.")] = None,
    any_classes: Annotated[bool, typer.Option("--any-classes", help=ANY_CLASSES)] = False,
    split: Annotated[str, typer.Option(help="test, or validation.")] = "test",
    images: Annotated[int, typer.Option(help="Drawn at most, chosen at random.", min=NEIGHBOURS + 1)] = 2000,
    classes: Annotated[int, typer.Option(help="The first so many are drawn.", min=2)] = 10,
    seed: Annotated[int, typer.Option(help="Of the choice and of t-SNE.", min=0, max=2**32 - 1)] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    workers: Annotated[int, typer.Option(min=0)] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Do not use a GPU.")] = False,
) -> None:
    """Draw the features of trained models by t-SNE, each merged as it was configured."""
    console = Console()
    with plain_errors():
        if output.suffix != ".png":
            raise ValueError(f"output: expected a file that ends in .png, got {output}")
        files = output, output.with_suffix(".json")
        require_own_or_new(files, lambda record: {"split", "runs"} <= record.keys(), "a picture of tsne")
        found = []
        for path in runs:
            saved = open_saved(path)
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
            device = make_accelerator(dataclasses.replace(saved.settings, mixed_precision="no", cpu=cpu)).device
            method = saved.settings.method
            title = path.name if path.name == method else f"{path.name} ({method})"
            found.append(embed(saved.model.to(device), loader, title, images=images, classes=classes, seed=seed))
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_embeddings(found, output)
        write_json(
            output.with_suffix(".json"),
            {
                "split": split,
                "seed": seed,
                "runs": [
                    {
                        "path": str(path),
                        "title": one.title,
                        "images": len(one.labels),
                        "neighbours": one.neighbours,
                        "silhouette": one.silhouette,
                    }
                    for path, one in zip(runs, found, strict=True)
                ],
                "versions": versions(),
            },
        )
    rows = [(one.title, str(len(one.labels)), f"{one.neighbours:.2f}", f"{one.silhouette:.3f}") for one in found]
    console.print(table_of(("run", "images", f"% by {NEIGHBOURS} neighbours", "silhouette"), rows))
    console.print(str(output), highlight=False)
