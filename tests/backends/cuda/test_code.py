"""Which GPUs and drivers run the code that was built. GPUs of one machine may differ: each is asked for itself."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
import torch
from calls import full_call
from torch._dynamo.testing import CompileCounter

from mosa_kernels import _extension
from mosa_kernels._extension import Extension
from mosa_kernels.backends.cuda import backend, code
from mosa_kernels.backends.triton import backend as triton


def test_each_gpu_is_asked_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return ((9, 0), (6, 1))[index]

    monkeypatch.setattr(code, "_known", {})
    monkeypatch.setattr(code, "why_no_code_for", lambda found: None if found >= (7, 0) else "not built")
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for _ in range(2):
        assert code.why_no_code(torch.device("cuda", 0)) is None
        assert code.why_no_code(torch.device("cuda", 1)) == "not built"
        assert code.why_no_code(torch.device("cuda")) == "not built"
    assert asked == [0, 1]


def test_a_call_on_a_gpu_without_code_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    monkeypatch.setattr(code, "_known", {0: None, 1: "no code"})
    monkeypatch.setattr(backend, "takes", lambda args: (True, ""))  # which declines every subclass
    args = full_call(1, 5, 24, 6)
    x = args.x.detach().as_subclass(OnGPU)
    assert backend.supports_adapter(args._replace(x=x)) == (False, "no code")
    monkeypatch.setitem(code._known, 1, None)
    assert backend.supports_adapter(args._replace(x=x)) == (True, "")


@pytest.mark.parametrize(
    ("toolkit", "driver", "runs"),
    [("13.0.88", 13000, True), ("12.8.93", 13000, True), ("12.8.93", 12040, True), ("13.0.88", 12080, False)],
)
def test_a_driver_older_than_the_toolkit_is_told_of(
    monkeypatch: pytest.MonkeyPatch, toolkit: str, driver: int, runs: bool
) -> None:
    """Drivers of the toolkit's major version, and newer ones, run its code."""
    module = SimpleNamespace(build_info={"cuda_toolkit": toolkit}, cuda_driver_version=lambda: driver)
    monkeypatch.setattr(backend, "extension", lambda: Extension(cast(ModuleType, module), None, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ok, reason = backend._look()
    assert ok == runs
    assert runs or reason == "the kernels were built with CUDA 13.0.88, and the driver is for CUDA 12.8 at most"


@pytest.mark.parametrize(
    ("capability", "driver", "reason"),
    [
        ((8, 6), 13000, None),  # machine code
        ((9, 0), 13020, None),
        ((9, 0), 13030, None),
        ((9, 0), 13010, "sm_90, and the driver, which is for CUDA 13.1, does not compile PTX of CUDA 13.2.51"),
        ((7, 5), 13030, "sm_75"),
    ],
)
def test_ptx_needs_a_driver_as_new_as_the_toolkit(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], driver: int, reason: str | None
) -> None:
    info = {"cuda_toolkit": "13.2.51", "cuda_architectures": "80-real 80-virtual"}
    module = SimpleNamespace(build_info=info, cuda_driver_version=lambda: driver)
    monkeypatch.setattr(_extension, "extension", lambda: Extension(cast(ModuleType, module), None, None))
    expected = None if reason is None else f"the CUDA kernels were not built for {reason}"
    assert _extension.why_no_code_for(capability) == expected


def test_a_graph_may_be_the_first_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled module is imported then, which cannot be traced; and what is known afterwards changes no graph."""
    monkeypatch.setattr(code, "_known", {})
    for module in (backend, triton):
        monkeypatch.setattr(module, "_found", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def answers(x: torch.Tensor) -> tuple[object, ...]:
        return x + 1, code.why_no_code(torch.device("cuda", 0)), backend.available(), triton.available()

    counter = CompileCounter()
    compiled = torch.compile(answers, fullgraph=True, backend=counter)
    for _ in range(2):
        assert compiled(torch.zeros(2))[1:] == answers(torch.zeros(2))[1:]
    assert counter.frame_count == 1
