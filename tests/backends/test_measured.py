"""The table of measured choices: which file, which cell, what is done without one, and what graphs make of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import mosa_kernels as mk
from mosa_kernels.backends import measured
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.choice import choose_adapter_backend
from mosa_kernels.backends.lookup import Backend, Operator
from mosa_kernels.version import __version__

GPU = "NVIDIA Imaginary 100-80GB"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def cell(operator: str, dtype: str, sizes: dict[str, int], **ms: float) -> dict[str, Any]:
    return {"operator": operator, "dtype": dtype, "sizes": sizes, "backend": min(ms, key=ms.__getitem__), "ms": ms}


def adapter_cell(d: int, r: int, tokens: int, operator: str = "adapter", dtype: str = "float32", **ms: float) -> Any:
    return cell(operator, dtype, {"d": d, "r": r, "tokens": tokens}, **ms)


def record(*cells: Any, device: str = GPU, **changes: Any) -> dict[str, Any]:
    return {
        "format": measured.FORMAT,
        "device": device,
        "versions": {"mosa_kernels": __version__, "torch": torch.__version__},
        "made": "2026-01-01",
        "complete": True,
        "cells": list(cells),
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's tables, for a machine whose only device is the imaginary GPU."""
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(measured, "device_name", lambda device: GPU)
    measured.forget()
    yield tmp_path / "cache" / "choice"
    measured.forget()


def put(folder: Path, table: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "nvidia-imaginary-100-80gb.json"
    file.write_text(table if isinstance(table, str) else json.dumps(table))
    return file


def backend(name: str, takes: Callable[[Any], bool] = lambda x: True) -> Backend:
    module = SimpleNamespace(supports_double=lambda x: (takes(x), f"{name} takes it not"))
    return Backend(lambda: (True, ""), lambda: module)


def operator_on(device: torch.device, **order: tuple[str, ...]) -> Operator:
    """An operator that is asked as the adapter is, of calls x [tokens, 768] with r = 64; Triton takes up to 2000."""
    return Operator(
        "double",
        {
            "reference": backend("reference"),
            "triton": backend("triton", lambda x: x.shape[0] <= 2000),
            "cuda": backend("cuda"),
        },
        order,
        kind=lambda x: ("adapter", device, x.dtype, x.shape[1], 64, x.shape[0]),
    )


def call(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype).expand(tokens, 768)


def test_the_nearest_cell_decides() -> None:
    def ranked(d: int, r: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
        column = table.column("adapter", dtype, (d, r))
        assert column is not None
        return column.at(tokens)

    table = measured.Table(
        Path(),
        record(
            adapter_cell(768, 64, 197, reference=1.0, triton=2.0, cuda=3.0),
            adapter_cell(768, 64, 12608, reference=3.0, triton=1.0, cuda=2.0),
            adapter_cell(192, 16, 197, reference=3.0, triton=2.0, cuda=1.0),
            adapter_cell(192, 64, 197, reference=3.0, triton=4.0, cuda=1.0),
            adapter_cell(768, 64, 100, dtype="bfloat16", triton=1.0),
        ),
    )
    assert ranked(768, 64, 197) == ranked(768, 64, 1) == ()
    assert ranked(768, 64, 10**9) == ("triton", "cuda")
    assert ranked(768, 64, 1575) == ()
    assert ranked(768, 64, 1576) == ("triton", "cuda")  # 8 times 197, and an 8th of 12608: the larger
    assert ranked(200, 12, 5) == ("cuda", "triton")
    assert ranked(384, 64, 197) == ()  # as near to 192 as to 768: the larger
    assert ranked(192, 33, 197) == ("cuda",)
    assert ranked(768, 64, 5, torch.bfloat16) == ("triton",)  # the definition has no time
    assert table.column("adapter", torch.float16, (768, 64)) is None
    assert table.column("merge", torch.float32, (768, 64)) is None


def test_names_and_preferences_come_before_the_table_and_the_table_before_the_order(folder: Path) -> None:
    fast_small = adapter_cell(768, 64, 197, reference=3.0, cuda=1.0, triton=2.0)
    fast_large = adapter_cell(768, 64, 12608, reference=3.0, cuda=2.0, triton=1.0)
    slow_half = adapter_cell(768, 64, 197, dtype="float16", reference=1.0, cuda=2.0)
    put(folder, record(fast_small, fast_large, slow_half))
    operator = operator_on(CUDA, cuda=("triton",))
    assert operator.choose("cuda", None, call(197)) == "cuda"
    assert operator.choose("cuda", None, call(1999)) == "triton"
    assert operator.choose("cuda", None, call(12608)) == "cuda"  # the second fastest takes it
    assert operator.choose("cuda", None, call(197, torch.float16)) == "reference"
    assert operator.choose("cuda", None, call(197, torch.float64)) == "triton"  # not measured: the order
    assert operator.choose("cuda", "triton", call(197)) == "triton"
    mk.prefer_backends("cuda", "triton")
    try:
        assert operator.choose("cuda", None, call(197)) == "triton"
    finally:
        mk.prefer_backends("cuda")
    assert operator.choose("cuda", None, call(197)) == "cuda"


def test_a_table_is_read_once(folder: Path) -> None:
    file = put(folder, record(adapter_cell(768, 64, 197, reference=3.0, cuda=1.0)))
    operator = operator_on(CUDA, cuda=("triton",))
    assert operator.choose("cuda", None, call(197)) == "cuda"
    file.unlink()
    assert operator.choose("cuda", None, call(5)) == "cuda"
    measured.forget()
    assert operator.choose("cuda", None, call(5)) == "triton"


def test_the_users_table_comes_before_the_packages(folder: Path) -> None:
    operator = operator_on(CUDA)
    # Those that are shipped hold for whatever version they are shipped with.
    put(measured.SHIPPED, record(adapter_cell(768, 64, 197, reference=3.0, triton=1.0), versions={}))
    assert operator.choose("cuda", None, call(197)) == "triton"
    file = put(folder, record(adapter_cell(768, 64, 197, reference=3.0, cuda=1.0)))
    measured.forget()
    assert operator.choose("cuda", None, call(197)) == "cuda"
    assert measured.search(CUDA).table.file == file
    file.write_text("{")
    measured.forget()
    with pytest.warns(UserWarning, match="is ignored: it is damaged"):
        assert operator.choose("cuda", None, call(197)) == "triton"


CELL = adapter_cell(768, 64, 197, reference=3.0, cuda=1.0)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("", "it is damaged"),
        ("[1]", "it is damaged"),
        (record(CELL, format=0), "it has format 0, this version reads"),
        (record(CELL, device="NVIDIA Other"), f"it was measured on NVIDIA Other, this is {GPU}"),
        (record(CELL, versions={"mosa_kernels": "0.0.9", "torch": "2.9.1"}), "with mosa_kernels 0.0.9, this is"),
        (record(CELL, versions={"mosa_kernels": __version__, "torch": "1.13.1"}), "with PyTorch 1.13.1, this is"),
        (record({**CELL, "dtype": "fp32"}), "it is damaged"),
        (record({**CELL, "sizes": {"d": 768}}), "it is damaged"),
        (record({**CELL, "sizes": {"d": 768, "r": 0, "tokens": 1}}), "it is damaged"),
        (record({**CELL, "sizes": {"d": 768, "r": 1.5, "tokens": 1}}), "it is damaged"),
        (record({**CELL, "operator": "other"}), "it is damaged"),
        (record({**CELL, "ms": None}), "it is damaged"),
        (record({**CELL, "ms": {"reference": "1"}}), "it is damaged"),
        (record(cells={}), "it is damaged"),
    ],
)
def test_a_table_that_does_not_hold_is_ignored_and_named_once(folder: Path, table: Any, reason: str) -> None:
    file = put(folder, table)
    operator = operator_on(CUDA, cuda=("triton",))
    with pytest.warns(UserWarning, match="mosa_kernels") as said:
        assert [operator.choose("cuda", None, call(n)) for n in (1, 2, 2000)] == ["triton"] * 3
    (message,) = [str(each.message) for each in said]
    assert message.startswith(f"mosa_kernels: {file} is ignored: ")
    assert reason in message
    assert "`mosa-kernels bench --choose --device cuda` makes a new one" in message


def test_another_patch_version_of_pytorch_is_the_same(folder: Path) -> None:
    torch_version = ".".join(torch.__version__.split(".")[:2]) + ".99+cu1"
    put(folder, record(CELL, versions={"mosa_kernels": __version__, "torch": torch_version}))
    assert operator_on(CUDA).choose("cuda", None, call(197)) == "cuda"


def test_idle_kernels_are_told_once_with_both_ways_out(folder: Path) -> None:
    operator = operator_on(CUDA)
    with pytest.warns(UserWarning, match="mosa_kernels") as said:
        assert {operator.choose("cuda", None, call(n)) for n in (1, 2, 2000)} == {"reference"}
    (message,) = [str(each.message) for each in said]
    for words in (GPU, "triton, cuda", "mosa-kernels bench --choose", "MOSA_CUDA_BACKENDS=triton,cuda"):
        assert words in message


def test_nobody_is_told_where_there_is_nothing_to_tell(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator_on(CUDA).choose("cuda", "reference", call(1))
        operator_on(CPU).choose("cpu", None, call(1))
        nothing = Operator("double", {"reference": backend("reference")}, {}, kind=operator_on(CUDA).kind)
        assert nothing.choose("cuda", None, call(1)) == "reference"
        mk.prefer_backends("cuda", "reference")
        try:
            assert operator_on(CUDA).choose("cuda", None, call(1)) == "reference"
        finally:
            mk.prefer_backends("cuda")
        put(folder, record(adapter_cell(768, 64, 197, reference=1.0, cuda=3.0)))
        measured.forget()
        assert operator_on(CUDA).choose("cuda", None, call(1)) == "reference"
        assert operator_on(CUDA).choose("cuda", None, call(1, torch.float64)) == "reference"


def test_a_graph_takes_the_answer_for_many_tokens(folder: Path) -> None:
    put(
        folder,
        record(
            adapter_cell(768, 64, 197, reference=1.0, cuda=3.0),
            adapter_cell(768, 64, 1576, reference=3.0, cuda=1.0),
            adapter_cell(64, 64, 197, reference=3.0, triton=1.0),
        ),
    )
    factors = {"reference": 1, "triton": 2, "cuda": 3}
    operator = operator_on(CUDA)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * factors[operator.choose("cuda", None, x)]

    for tokens in (5, 197, 1576):
        assert function(torch.ones(tokens, 768)).unique().tolist() == [3]
    operator.choose("cuda", None, call(9))  # what eager calls remember has nothing compiled again
    assert function(torch.ones(8, 768)).unique().tolist() == [3]
    assert counter.frame_count == 1
    assert function(torch.ones(7, 64)).unique().tolist() == [2]


def test_a_graph_without_a_table_tells_of_idle_kernels_once(folder: Path) -> None:
    operator = operator_on(CUDA)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + {"reference": 1, "triton": 2, "cuda": 3}[operator.choose("cuda", None, x)]

    with pytest.warns(UserWarning, match="mosa-kernels bench --choose"):
        assert function(torch.zeros(3, 768)).unique().tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.choose("cuda", None, call(3))
        assert function(torch.zeros(3, 768)).unique().tolist() == [1]
    assert counter.frame_count == 1


def test_symbolic_sizes_outside_a_graph_have_an_answer(folder: Path) -> None:
    put(folder, record(adapter_cell(768, 64, 197, reference=1.0, cuda=3.0), adapter_cell(768, 64, 1576, cuda=3.0)))
    operator = operator_on(CUDA)
    found: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(operator.choose("cuda", None, x))
        return x + 1

    make_fx(function, tracing_mode="symbolic")(torch.ones(1576, 768))
    make_fx(function, tracing_mode="fake")(torch.ones(5, 768))
    assert found == ["cuda", "reference"]


def adapter_call(tokens: int, width: int, bottleneck: int, trains: bool) -> AdapterArguments:
    w_up = torch.zeros(width, bottleneck, requires_grad=trains)
    return AdapterArguments(call(tokens)[:, :width], None, torch.zeros(bottleneck, width), None, w_up, *(None,) * 10)


def test_the_adapter_is_asked_with_and_without_gradients(folder: Path) -> None:
    sizes = (192, 16, 197)
    forward = adapter_cell(*sizes, operator="adapter_forward", reference=1.0, cpu=2.0)
    put(folder, record(forward, adapter_cell(*sizes, reference=2.0, cpu=1.0)))
    assert choose_adapter_backend(adapter_call(197, 192, 16, trains=True)) == "cpu"
    assert choose_adapter_backend(adapter_call(197, 192, 16, trains=False)) == "reference"
    with torch.no_grad():
        assert choose_adapter_backend(adapter_call(197, 192, 16, trains=True)) == "reference"
    products_in_bf16 = adapter_call(197, 192, 16, trains=False)._replace(compute_dtype=torch.bfloat16)
    assert choose_adapter_backend(products_in_bf16) == "cpu"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_adapter_runs_what_the_table_says(folder: Path, dynamic: bool) -> None:
    layer = mk.FusedMoSAAdapter(32, 8, 2)
    x = torch.randn(2, 5, 32)
    for times, op_calls in (({"reference": 1.0, "cpu": 2.0}, 0), ({"reference": 2.0, "cpu": 1.0}, 1)):
        put(folder, record(adapter_cell(32, 8, 10, **times)))
        measured.forget()
        torch._dynamo.reset()
        found: list[int] = []

        def count(graph: Any, inputs: Any, found: list[int] = found) -> Any:
            found.append(sum("mosa_kernels.adapter_forward" in str(node.target) for node in graph.graph.nodes))
            return graph.forward

        torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=count)(x, expert=1)
        assert found == [op_calls]


def test_where_tables_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOSA_CACHE", str(tmp_path / "own"))
    assert measured.user_folder() == tmp_path / "own" / "choice"
    monkeypatch.delenv("MOSA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.user_folder() == tmp_path / "mosa_kernels" / "choice"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert measured.user_folder() == tmp_path / "home" / ".cache" / "mosa_kernels" / "choice"
    assert measured.file_name("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb.json"
    if not torch.cuda.is_available():
        assert measured.device_name(CUDA) == "no CUDA device"


def test_tables_that_are_shipped_can_be_read() -> None:
    for file in measured.SHIPPED.glob("*.json"):
        table = measured.Table(file, json.loads(file.read_text()))
        assert file.name == measured.file_name(table.record["device"])
        assert measured.unfit(table.record, table.record["device"], shipped=True) is None
        assert table.summary()
