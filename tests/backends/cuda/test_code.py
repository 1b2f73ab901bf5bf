"""GPUs of one machine that differ: each is asked for itself."""

from __future__ import annotations

import pytest
import torch
from calls import full_call

from mosa_kernels.backends.cuda import backend, code


def test_each_gpu_is_asked_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def capability(index: int) -> tuple[int, int]:
        asked.append(index)
        return ((9, 0), (6, 1))[index]

    monkeypatch.setattr(code, "_known", {})
    monkeypatch.setattr(code, "has_code_for", lambda found: found >= (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for _ in range(2):
        assert code.why_no_code(torch.device("cuda", 0)) is None
        assert code.why_no_code(torch.device("cuda", 1)) == "the CUDA kernels were not built for sm_61"
        assert code.why_no_code(torch.device("cuda")) == "the CUDA kernels were not built for sm_61"
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
