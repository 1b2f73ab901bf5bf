"""Finds the subcommand and imports it, and nothing else: `mosa-kernels --help` needs no PyTorch.

A command NAME is the function NAME in the module `mosa_kernels.cli.NAME`, with typer's annotations; a hyphen in it is
an underscore there.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mosa_kernels.cli.errors import plain_errors
from mosa_kernels.version import __version__

COMMANDS = {
    "demo": "Fine-tune a small vision transformer on real digits in minutes and compare MoSA with its baselines.",
    "train": "Fine-tune a timm model with MoSA or a baseline.",
    "evaluate": "Measure the accuracy of a trained adapter.",
    "merge": "Merge a trained MoSA into plain dense adapters.",
    "bench": "Measure kernels and whole models on this machine.",
    "check-data": "Say whether a data set is complete, and whether it is the one of the paper.",
    "table": "Run or resume the grid behind one of the paper's tables, and write the table.",
    "tsne": "Draw the features of trained models side by side.",
    "doctor": "Say which versions and backends are here, and why others are not.",
}


class LazyGroup(TyperGroup):
    """Imports the module of a command when that command is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, command, rest
        with plain_errors():  # the package reads its environment variables as it is imported
            return name, load_command(name), rest


def load_command(name: str) -> Any:
    """The command of this name, imported."""
    function = name.replace("-", "_")
    command = getattr(importlib.import_module(f"mosa_kernels.cli.{function}"), function)
    single = typer.Typer(add_completion=False)
    single.command(name, help=None if command.__doc__ else COMMANDS[name])(command)
    return typer.main.get_command(single)


def _in_the_list_of_commands() -> None:
    """Stands for a command in the help; `LazyGroup` runs the command itself."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
for _name, _help in COMMANDS.items():
    app.command(_name, help=_help)(_in_the_list_of_commands)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture of sparse adapters (MoSA) for timm models: fine-tune, merge, evaluate."""
