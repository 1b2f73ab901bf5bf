"""`mosa-kernels check-data`: is a data set complete, and is it the one that the paper used?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mosa_kernels.cli.errors import plain_errors


def check_data(
    data: Annotated[str, typer.Argument(help="As --data of train: vtab:<folder>, fgvc:<folder>, a folder, ...")],
    data_root: Annotated[Path | None, typer.Option(help="Files of a torchvision or timm data set.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Read every image, too: minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a data set is complete, and whether it is the one of the paper.

    Exits with 1 where files are missing or where classes or split sizes are not those of the paper's Table 11.
    """
    with plain_errors():
        from mosa_kernels.data.open import open_data
        from mosa_kernels.train.relevance import meaningless_of_data, refuse

        given = {"data_root": data_root is not None, "decode": decode}
        refuse(meaningless_of_data(data), [name for name, is_so in given.items() if is_so])
        splits = open_data(data, root=data_root, verify=decode)
    found = splits.summary()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(
            f"{splits.name}: {found['classes']} classes, {found['train']} training, {found['validation']} validation "
            f"and {found['test']} test images\n{splits.note}\nfingerprint {splits.fingerprint}"
        )
        if splits.differs:
            typer.echo(f"NOT the data set of the paper's Table 11: {'; '.join(splits.differs)}")
        elif splits.benchmark:
            typer.echo("classes and split sizes are those of the paper's Table 11")
        else:
            typer.echo("not a data set of the paper's Table 11: nothing to compare with")
    if splits.differs:
        raise typer.Exit(1)
