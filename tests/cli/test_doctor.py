"""`mosa-kernels doctor`, and the command itself."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import sysconfig

import pytest
from typer.testing import CliRunner

from mosa_kernels import _extension
from mosa_kernels._extension import Extension, extension
from mosa_kernels.backends import measured
from mosa_kernels.cli import doctor, main
from mosa_kernels.version import __version__

runner = CliRunner()


def test_says_what_is_here() -> None:
    result = runner.invoke(main.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for heading in ("Versions", "GPU", "Compiled kernels", "Backends", "Usable."):
        assert heading in result.output


def test_json_holds_every_backend_with_true_or_a_reason() -> None:
    result = runner.invoke(main.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["problems"] == []
    assert report["versions"]["mosa_kernels"] == __version__
    assert report["automatic"]["cpu"][-1] == report["automatic"]["cuda"][-1] == "reference"
    assert report["backends"]["reference"] is True
    for answer in (*report["backends"].values(), report["compiled"]["cpp"], report["compiled"]["cuda"]):
        assert answer is True or (isinstance(answer, str) and len(answer) > 10)
    built = extension()
    assert report["compiled"]["cpp"] == (built.reason or True)
    if built.module is not None:
        assert report["compiled"]["compiler"] == built.module.build_info["compiler"]


def test_a_missing_module_is_explained_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "mosa_kernels._C was not built: no C++ compiler was found"
    monkeypatch.setattr(doctor, "extension", lambda: Extension(None, reason, reason))
    result = runner.invoke(main.app, ["doctor"])
    assert result.exit_code == 0
    assert reason in " ".join(result.output.split())


def test_an_unusable_package_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    import mosa_kernels.backends.choice as choice

    monkeypatch.setattr(choice, "available_backends", lambda: {"reference": "broken for a test"})
    result = runner.invoke(main.app, ["doctor"])
    assert result.exit_code == 1
    assert "Not usable" in result.output
    assert "broken for a test" in result.output


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["75-real", "80-real"], True),
        ((8, 6), ["80-real"], True),
        ((8, 0), ["86-real"], False),
        ((9, 0), ["80-real"], False),
        ((9, 0), ["80-virtual"], True),
        ((7, 0), ["75-real", "120-virtual"], False),
        ((12, 1), ["120-real"], True),
        ((9, 0), ["90a-real"], True),
        ((10, 0), ["90a-virtual"], False),
        ((10, 3), ["100f-real"], True),
        ((8, 0), [], False),
    ],
)
def test_which_gpu_runs_which_code(capability: tuple[int, int], architectures: list[str], runs: bool) -> None:
    assert _extension.runs_on(capability, architectures) is runs


def test_a_module_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension().module is None:
        pytest.skip(str(extension().reason))
    monkeypatch.setattr(_extension, "__version__", "9.9.9")
    refused = extension.__wrapped__()
    assert refused.module is None
    assert refused.reason is not None
    assert f"built for version {__version__}, this is 9.9.9" in refused.reason


def test_the_recorded_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    record = tmp_path / "_build.json"
    monkeypatch.setattr(_extension, "BUILD_RECORD", record)
    monkeypatch.setitem(sys.modules, "mosa_kernels._C", None)
    assert "pip install ." in str(extension.__wrapped__().reason)
    record.write_text('{"native": "no C++ compiler was found", "cuda": null}')
    assert extension.__wrapped__().reason == "mosa_kernels._C was not built: no C++ compiler was found"
    (tmp_path / "_C.so").touch()
    assert "does not load" in str(extension.__wrapped__().reason)


def test_a_module_for_another_python_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(_extension, "BUILD_RECORD", tmp_path / "_build.json")
    monkeypatch.setitem(sys.modules, "mosa_kernels._C", None)
    other = "_C.cpython-39-x86_64-linux-gnu.so"
    (tmp_path / other).touch()
    reason = str(extension.__wrapped__().reason)
    assert f"built for another Python ({other}), this is {platform.python_version()}" in reason
    (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    assert "does not load" in str(extension.__wrapped__().reason)


def test_where_the_reference_is_faster_on_a_cpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path))
    measured.forget()
    try:
        shown = json.loads(runner.invoke(main.app, ["doctor", "--json"]).output)["choice"]["cpu"]["operators"]
    finally:
        measured.forget()
    assert shown["adapter"] == (
        "cpu, then reference; in eager mode reference where r >= 192 and x has fewer than 2,400,000 entries"
    )
    assert shown["merge"] == "cpu, then reference"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_no_pytorch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom mosa_kernels.cli.main import app\n"
        "try: app(sys.argv[1:])\nexcept SystemExit as exit: assert not exit.code\n"
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "doctor" in result.stdout or __version__ in result.stdout


@pytest.mark.parametrize("words", [["doctor"], ["train", "--help"]])
@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("MOSA_CUDA_BACKENDS", "triton,foo", "names: expected any of cpu, triton, cuda, reference, got 'foo'"),
        ("MOSA_CUDA_ONE_LAUNCH", "yes", "expected 1, or 0 for off, got 'yes'"),
        ("MOSA_CUDA_ONE_LAUNCH", "2", "expected 1, or 0 for off, got '2'"),
    ],
)
def test_a_wrong_setting_of_the_environment_is_said_by_every_command(
    variable: str, value: str, expected: str, words: list[str]
) -> None:
    code = "from mosa_kernels.cli.main import app; app()"
    environment = {**os.environ, variable: value}
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert f"{variable}: {expected}" in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_listed_command_exists_and_has_help(name: str) -> None:
    assert importlib.util.find_spec(f"mosa_kernels.cli.{name.replace('-', '_')}") is not None
    result = runner.invoke(main.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert name in result.output


def test_an_unknown_command_is_named() -> None:
    result = runner.invoke(main.app, ["docto"])
    assert result.exit_code == 2
    assert "docto" in result.output
