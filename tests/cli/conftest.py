"""The command line on fifteen pictures, and one short run that several tests look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import make_pictures
from typer.testing import CliRunner

Command = Callable[..., Any]
SMALL = ("--epochs", "2", "--batch-size", "5", "--lr", "0.02", "--bottleneck", "8", "--num-experts", "2", "--cpu")


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs `mosa-kernels` with the given words; the result has exit_code, stdout and stderr."""

    def run(*words: object) -> Any:
        from mosa_kernels.cli.main import app

        return CliRunner().invoke(app, [str(word) for word in words])

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def trained(command: Command, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run's folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "mosa"
    result = command("train", "--data", pictures, "--output", folder, *SMALL)
    assert result.exit_code == 0, result.output
    return folder, result.stdout
