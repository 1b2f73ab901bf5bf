"""Calls for another device than the current one."""

from __future__ import annotations

import pytest
import torch
from accuracy import all_needs, on
from calls import full_call
from cuda_machine import tensors_of

from mosa_kernels.backends.cuda import backend, device


def test_another_device_is_made_current_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert isinstance(device.current(torch.device("cuda", 0)), torch.cuda.device)
    for same in (torch.device("cuda", 1), torch.device("cuda")):
        assert device.current(same) is device._UNCHANGED


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_another_device_than_the_current_one() -> None:
    args = on(full_call(2, 30, 768, 128, torch.float16, expert=torch.tensor([1, 3])), "cuda:1")
    grad_out = torch.randn_like(args.x)

    def run() -> list[torch.Tensor]:
        out, mean, rstd = backend.adapter_forward(args)
        return tensors_of(out, backend.adapter_backward(args, grad_out, mean, rstd, all_needs(args)))

    with torch.cuda.device(1):
        wanted = run()
    with torch.cuda.device(0):
        found = run()
        assert torch.cuda.current_device() == 0
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
