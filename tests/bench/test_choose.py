"""`bench --choose`: what is measured, what a backend that is wrong, raises or crashes leads to, and what is written."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mosa_kernels.backends import cpu, lookup, measured
from mosa_kernels.backends.cpu import merge as cpu_merge
from mosa_kernels.bench import choose as choosing
from mosa_kernels.bench import choose_gate
from mosa_kernels.bench.choose import BACKENDS, DeviceLostError, cells, choose, table_file
from mosa_kernels.bench.choose_gate import Cell, gate_apart, provider_of, with_cases
from mosa_kernels.bench.run import Request
from mosa_kernels.bench.shapes import Axes, Point
from mosa_kernels.functional.alignment import feature_alignment
from mosa_kernels.functional.operators import OPERATORS

CPU = torch.device("cpu")
POINT = Point("swin_b_4", 1, 8, 3)
TINY = Axes(("swin_b_4",), (1,), (8,), (3,), ("fp32",))
ALL = [Cell(name, POINT._replace(layers=2 if name in ("merge", "masked_adamw") else 1), 7) for name in measured.SIZES]


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    measured.forget()
    yield
    measured.forget()
    torch.set_num_threads(threads)


def test_every_operator_and_dtype_is_measured_at_different_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    on_gpu, on_cpu = cells("cuda"), cells("cpu")
    assert on_gpu[0].operator == "adapter_forward"
    assert {cell.operator for cell in on_gpu} == measured.SIZES.keys()
    assert {cell.operator for cell in on_cpu} == {
        name for name, operator in OPERATORS.items() if "cpu" in operator.backends
    }
    for name in measured.SIZES.keys() - {"split"}:
        for dtype in ("float32", "float16", "bfloat16"):
            sizes = [tuple(cell.sizes.items()) for cell in on_gpu if (cell.operator, cell.dtype) == (name, dtype)]
            assert len(sizes) == len(set(sizes)) >= 2, (name, dtype)
    widths = {(cell.sizes["d"], cell.sizes["r"]) for cell in on_gpu if cell.operator == "adapter"}
    assert {d for d, _ in widths} == {192, 768, 1024}
    assert {r for _, r in widths} == {16, 64, 256}
    assert not any(cell.dtype == "float16" for cell in on_cpu)


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.operator)
def test_cells_have_the_sizes_that_calls_are_asked_by(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[measured.Kind] = []
    right = lookup.Operator.choose

    def noting(self: lookup.Operator, device_type: str, backend: str | None, *call: Any) -> str:
        assert self.kind is not None
        found.append(self.kind(*call))
        return right(self, device_type, backend, *call)

    ((_, case),) = with_cases([cell], CPU)
    monkeypatch.setattr(lookup.Operator, "choose", noting)
    if cell.operator == "feature_alignment":
        feature_alignment(*case.features)  # type: ignore[attr-defined]
    else:
        provider_of(case, "reference").prepare().run()
    assert found[-1][0] == cell.operator
    assert found[-1][1:3] == (CPU, getattr(torch, cell.dtype))
    assert found[-1][3:] == tuple(cell.sizes.values())


BREAKING = """
import os
import mosa_kernels.backends.cpu as cpu
import mosa_kernels.backends.cpu.merge as merge
import mosa_kernels.backends.cpu.masked_adamw as masked_adamw
right = cpu.adapter_forward
cpu.adapter_forward = lambda args: (right(args)[0] * 1.01, *right(args)[1:])
def raising(*_): raise RuntimeError("broken for a test")
merge.merge = raising
masked_adamw.masked_adamw = lambda *_: os.abort()
"""


def test_the_gate_survives_what_is_wrong_raises_and_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(BREAKING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    by_name = {cell.operator: cell for cell in ALL}
    order = ["adapter_forward", "merge", "masked_adamw", "split"]
    reasons = gate_apart("cpu", [by_name[name] for name in order], CPU)
    answers = dict(zip(order, reasons, strict=True))
    assert str(answers["adapter_forward"]).startswith("error gate red: out: relative error")
    assert answers["merge"] == "broken for a test"
    assert str(answers["masked_adamw"]).startswith("its process ended with -6")
    assert answers["split"] is None


def test_the_gate_goes_on_after_a_process_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[tuple[list[str | None], str | None]] = [
        ([None, "it left the device unusable"], "it left the device unusable"),
        ([None], "its process ended with -11: "),
        ([None] * 3, None),
    ]
    asked: list[int] = []

    def ask(backend: str, cells: list[Cell], *_: Any) -> tuple[list[str | None], str | None]:
        asked.append(len(cells))
        return ends[len(asked) - 1]

    monkeypatch.setattr(choose_gate, "_ask", ask)
    seven = [ALL[0]] * 7
    lost, died = (end for _, end in ends[:2])
    assert gate_apart("cpu", seven, CPU) == [None, lost, None, died, None, None, None]
    assert asked == [7, 5, 3]
    asked.clear()
    ends[2] = ([], died)
    *first, sixth, seventh = gate_apart("cpu", seven, CPU)
    assert first == [None, lost, None, died, died]
    assert sixth == seventh == f"not tried, after others ended their processes, such as: {died}"


def test_the_gate_asks_each_backend_and_dtype_of_a_gpu_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    groups: list[tuple[str, set[str], int]] = []

    def gate(backend: str, cells: list[Cell], device: torch.device, seconds: float) -> list[str | None]:
        groups.append((backend, {cell.point.dtype for cell in cells}, len(cells)))
        return [f"{backend} {cell.name}" for cell in cells]

    monkeypatch.setattr(choosing, "gate_apart", gate)
    wanted = cells("cuda")
    found = choosing._gate(("triton", "cuda"), wanted, torch.device("cuda", 0), None, lambda line: None)
    assert sorted((name, *dtypes) for name, dtypes, _ in groups) == [
        (name, dtype) for name in ("cuda", "triton") for dtype in ("bf16", "fp16", "fp32")
    ]
    assert all(reason == f"{name} {cell.name}" for (name, cell), reason in found.items())
    for cell in wanted:
        asked = {name for name in ("triton", "cuda") if (name, cell) in found}
        assert asked == {"triton", "cuda"} & OPERATORS[cell.operator].backends.keys()


def test_a_gate_that_hangs_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    first, second = gate_apart("cpu", ALL[:2], CPU, 0.5)
    assert first == "it was not done when the 0.5 s for all calls were over"
    assert second == f"not tried, after others ended their processes, such as: {first}"


@pytest.mark.parametrize(
    ("deadline", "cores", "seconds"), [(None, 16, 300), (130, 16, 65), (130, 2, 130 / 2 / 6), (5000, 16, 300)]
)
def test_half_of_a_deadline_is_left_by_the_gate(
    deadline: int | None, cores: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def gate(backend: str, cells: list[Cell], device: torch.device, seconds: float) -> list[str | None]:
        given.append(seconds)
        return [None] * len(cells)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(choosing, "gate_apart", gate)
    monkeypatch.setattr(choosing, "available_cores", lambda: cores)
    device = torch.device("cuda", 0)
    choosing._gate(("triton", "cuda"), cells("cuda"), device, deadline, lambda line: None)
    assert given == [pytest.approx(seconds)] * 6
    assert choosing._gate((), cells("cuda"), device, deadline, lambda line: None) == {}


@pytest.fixture
def _gate_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "gate_apart", lambda backend, cells, device, seconds: [None] * len(cells))


def quickly(**options: Any) -> tuple[dict[str, Any], Path]:
    return choose(Request(device="cpu", axes=TINY, rounds=3, threads=1, **options), None, lambda line: None)


@pytest.mark.usefixtures("_gate_open")
def test_what_raises_while_it_is_timed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = cpu.adapter_forward

    def failing(args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("broken for a test")
        return right(args)

    monkeypatch.setattr(cpu, "adapter_forward", failing)
    table, file = quickly()
    first, *rest = table["cells"]
    assert first["operator"] == "adapter_forward"
    assert first["left_out"] == {"cpu": "broken for a test"}
    assert first["ms"].keys() == {"reference"}
    assert first["backend"] == "reference"
    assert rest
    assert all(cell["ms"].keys() == {"reference", "cpu"} and not cell["left_out"] for cell in rest)
    assert table["complete"]
    assert json.loads(file.read_text()) == table


@pytest.mark.usefixtures("_gate_open")
def test_a_lost_device_ends_it_with_the_call_and_leaves_the_rest_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(cpu_merge, "merge", failing)
    monkeypatch.setattr(choosing, "is_lost", lambda device: True)
    with pytest.raises(DeviceLostError) as raised:
        quickly()
    message = str(raised.value)
    where = "merge, float32, d 1024, r 8, adapters 12"
    assert message.startswith(f"cpu left cpu unusable for this process in {where}: CUDA error: an illegal memory")
    file = table_file(None, CPU)
    assert f"; 2 of 5 calls are in {file}" in message
    table = json.loads(file.read_text())
    assert [cell["operator"] for cell in table["cells"]] == ["adapter_forward", "adapter"]
    assert not table["complete"]
    assert measured.search(CPU).table is not None


@pytest.mark.usefixtures("_gate_open")
def test_a_deadline_leaves_the_rest_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "time", SimpleNamespace(perf_counter=itertools.count(step=10).__next__))
    table, _ = quickly(deadline=5)
    assert table["cells"] == []
    assert len(table["not_measured"]) == len(cells("cpu", TINY))
    assert not table["complete"]


def test_where_the_table_goes(tmp_path: Path) -> None:
    name = measured.file_name(measured.device_name(CPU))
    assert table_file(None, CPU) == tmp_path / "cache" / "choice" / name
    assert table_file(tmp_path / "a.json", CPU) == tmp_path / "a.json"
    assert table_file(tmp_path / "a", CPU) == tmp_path / "a" / name
    assert BACKENDS.keys() == {"cpu", "cuda"}
