"""`mosa-kernels doctor`: what is here, what is not, and why, in plain words."""

from __future__ import annotations

import importlib
import json
import platform
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mosa_kernels._extension import cuda_version, extension, why_no_code_for
from mosa_kernels.version import __version__

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "triton", "timm", "accelerate", "safetensors", "numpy")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say which versions and backends are here, and why others are not. Exits with 0 when the package is usable."""
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The report: versions, GPUs, what `_C` was built for, True or a reason for each kind of kernel, and what is tried
    in which order where a call names none ("automatic": without a table; "choice": where that comes from, by device).

    "problems" lists what makes the package unusable; it is empty on a healthy machine.
    """
    report: dict[str, Any] = {
        "versions": {"mosa_kernels": __version__, "python": platform.python_version()},
        "platform": platform.platform(),
        "gpus": [],
        "compiled": _examine_extension(),
        "backends": {},
        "automatic": {},
        "choice": {},
        "problems": [],
    }
    for package in PACKAGES:
        try:
            report["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            report["versions"][package] = None
    try:
        report.update(_examine_gpus(report["compiled"]))
    except ImportError as error:
        report["problems"].append(f"PyTorch does not import: {error}")
        return report
    try:
        choice = importlib.import_module("mosa_kernels.backends.choice")
    except ValueError as error:  # a wrong environment variable
        report["problems"].append(str(error))
        return report
    for name, answer in choice.available_backends().items():
        report["backends"][name] = answer
    report["automatic"] = {device: list(choice.automatic_backends(device)) for device in ("cpu", "cuda")}
    report["choice"] = _examine_choice(choice)
    if report["backends"].get("reference") is not True:
        report["problems"].append(f"the reference backend does not work: {report['backends'].get('reference')}")
    return report


def _examine_extension() -> dict[str, Any]:
    module, reason, cuda_reason = extension()
    info = {} if module is None else dict(module.build_info)
    driver = 0 if module is None or cuda_reason else module.cuda_driver_version()
    return {
        "cpp": reason or True,
        "cuda": cuda_reason or True,
        "compiler": info.get("compiler"),
        "cuda_toolkit": info.get("cuda_toolkit") or None,
        "cuda_architectures": (info.get("cuda_architectures") or "").split() or None,
        "cuda_driver": cuda_version(driver) if driver else None,  # 0: there is no driver
    }


def _examine_gpus(compiled: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's CUDA and its GPUs, each with whether `_C` has code for it."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "gpus": []}
    if torch.cuda.is_available():
        found["no_gpu_because"] = None
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            gpu = {
                "name": torch.cuda.get_device_name(index),
                "capability": f"{major}.{minor}",
                "compiled_kernels": why_no_code_for((major, minor)) or True,
            }
            found["gpus"].append(gpu)
    elif torch.version.cuda is None:
        found["no_gpu_because"] = "this PyTorch is built without CUDA"
    elif compiled["cuda"] is True and compiled["cuda_driver"] is None:
        found["no_gpu_because"] = "no NVIDIA driver is loaded"
    else:
        found["no_gpu_because"] = "PyTorch sees no CUDA device"
    return found


def _examine_choice(choice: ModuleType) -> dict[str, Any]:
    """By device, where the automatic choice comes from, and what it is for each operator."""
    import torch

    devices = {"cpu": torch.device("cpu")}
    devices |= {f"cuda:{index}": torch.device("cuda", index) for index in range(torch.cuda.device_count())}
    return {name: _examine_choice_on(device, choice) for name, device in devices.items()}


def _examine_choice_on(device: torch.device, choice: ModuleType) -> dict[str, Any]:
    from mosa_kernels.backends import measured
    from mosa_kernels.backends.lookup import preferred_backends
    from mosa_kernels.functional.operators import OPERATORS

    found: dict[str, Any] = {"file": None, "made": None, "ignored": [], "advice": None}
    preferred = preferred_backends(device.type)
    if preferred is not None:
        runs = {"every operator": ", then ".join(choice.automatic_backends(device.type))}
        return {**found, "source": f"request: {', '.join(preferred)}", "operators": runs}
    orders = {name: (*operator.order.get(device.type, ()), "reference") for name, operator in OPERATORS.items()}
    exceptions = {name: operator.exceptions.get(device.type) for name, operator in OPERATORS.items()}
    runs = {name: "; ".join(filter(None, (", then ".join(order), exceptions[name]))) for name, order in orders.items()}
    table, ignored = measured.search(device)
    found["ignored"] = list(ignored)
    if table is not None:
        made = table.record.get("made")
        unfinished = "" if table.record.get("complete") else ", not finished"
        found |= {"file": str(table.file), "made": made}
        return {**found, "source": f"{table.file}, measured {made}{unfinished}", "operators": runs | table.summary()}
    idle = device.type == "cuda" and any(choice.available_backends()[name] is True for name in ("triton", "cuda"))
    return {
        **found,
        "source": "the built-in order; nothing was measured on this device",
        "operators": runs,
        "advice": measured.ADVICE if idle else None,
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)

    def line(name: str, answer: Any) -> None:
        console.print(f"  {name:<20}{'[dim]not found[/dim]' if answer is None else escape(str(answer))}")

    def available(name: str, answer: bool | str, yes: str = "available") -> None:
        text = f"[green]{yes}[/green]" if answer is True else f"[yellow]not {yes}[/yellow]: {escape(str(answer))}"
        console.print(f"  {name:<20}{text}")

    console.print("[bold]Versions[/bold]")
    for name, version in report["versions"].items():
        line(name, version)
    line("platform", report["platform"])

    compiled = report["compiled"]
    console.print("[bold]GPU[/bold]")
    if "torch_cuda" in report:
        line("CUDA of PyTorch", report["torch_cuda"] or "none: a CPU build")
    line("CUDA of the driver", compiled["cuda_driver"])
    for index, gpu in enumerate(report["gpus"]):
        kernels = "" if gpu["compiled_kernels"] is True else f"; {gpu['compiled_kernels']}"
        line(f"GPU {index}", f"{gpu['name']}, compute capability {gpu['capability']}{kernels}")
    if report.get("no_gpu_because"):
        line("GPUs", f"none: {report['no_gpu_because']}")

    console.print("[bold]Compiled kernels (mosa_kernels._C)[/bold]")
    available("C++", compiled["cpp"], "usable")
    idle = compiled["cuda"] is True and not report["gpus"]
    available("CUDA", "built, but there is no GPU" if idle else compiled["cuda"], "usable")
    if compiled["compiler"]:
        line("built by", compiled["compiler"])
    if compiled["cuda_toolkit"]:
        line("CUDA toolkit", compiled["cuda_toolkit"])
        line("built for", _spell_architectures(compiled["cuda_architectures"]))

    console.print("[bold]Backends[/bold]")
    for name, answer in report["backends"].items():
        available(name, answer)
    for device, found in report["choice"].items():
        console.print(f"[bold]What runs on {escape(device)}[/bold]")
        line("chosen by", found["source"])
        for sentence in found["ignored"]:
            console.print(f"  [yellow]{escape(sentence)}[/yellow]")
        for operator, runs in found["operators"].items():
            line(operator, runs)
        if found["advice"]:
            console.print(f"  [yellow]{escape(found['advice'])}[/yellow]")

    if report["problems"]:
        console.print("[bold red]Not usable[/bold red]")
        for problem in report["problems"]:
            console.print(f"  {escape(problem)}")
    else:
        console.print("[bold green]Usable.[/bold green]")


def _spell_architectures(architectures: list[str]) -> str:
    code = [f"sm_{name.removesuffix('-real')}" for name in architectures if name.endswith("-real")]
    ptx = [f"PTX {name.removesuffix('-virtual')}" for name in architectures if name.endswith("-virtual")]
    return ", ".join(code + ptx)
