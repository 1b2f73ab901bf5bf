"""Which backend runs a call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mosa_kernels as mk
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.choice import ADAPTER, automatic_backends, choose_adapter_backend
from mosa_kernels.backends.lookup import NAMES
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.triton import backend as triton
from mosa_kernels.functional.masked_adamw import OPERATOR as MASKED_ADAMW


def _call(tokens: int, width: int, bottleneck: int, dtype: torch.dtype = torch.float32) -> AdapterArguments:
    x = torch.zeros(1, dtype=dtype).expand(tokens, width)
    return AdapterArguments(
        x, None, torch.zeros(bottleneck, width), None, torch.zeros(width, bottleneck), *(None,) * 10
    )


@pytest.mark.parametrize(
    ("tokens", "width", "bottleneck", "backend"),
    [
        (12608, 768, 64, "cpu"),
        (197, 768, 64, "cpu"),
        (197, 768, 256, "reference"),  # in the cache eager PyTorch's products are faster
        (197, 768, 16, "cpu"),
        (1, 192, 8, "cpu"),
    ],
)
def test_automatic_choice_by_size(tokens: int, width: int, bottleneck: int, backend: str) -> None:
    assert choose_adapter_backend(_call(tokens, width, bottleneck)) == backend


def test_what_no_fused_backend_takes_runs_the_definition() -> None:
    assert choose_adapter_backend(_call(12608, 768, 64, torch.float64)) == "reference"


def test_a_name_is_kept_or_refused_with_the_reason() -> None:
    assert choose_adapter_backend(_call(197, 768, 64), "cpu") == "cpu"
    with pytest.raises(ValueError, match="backend: 'cpu' does not take this call: x: expected float32 or bfloat16"):
        choose_adapter_backend(_call(5, 8, 4, torch.float64), "cpu")
    with pytest.raises(ValueError, match="backend: 'cuda' does not take this call: "):
        choose_adapter_backend(_call(5, 8, 4), "cuda")
    with pytest.raises(ValueError, match=r"backend: expected one of .* got 'tpu'"):
        choose_adapter_backend(_call(5, 8, 4), "tpu")


def test_every_backend_is_available_or_says_why_not() -> None:
    found = mk.available_backends()
    assert found.keys() == {*ADAPTER.backends} == {*NAMES}
    assert found["reference"] is True
    assert found["cpu"] is True
    for answer in found.values():
        assert answer is True or (isinstance(answer, str) and len(answer) > 10)


@pytest.fixture
def _own_order() -> Iterator[None]:
    yield
    for device_type in ("cpu", "cuda"):
        mk.prefer_backends(device_type)


@pytest.mark.usefixtures("_own_order")
def test_a_preference_comes_before_the_table() -> None:
    small = _call(197, 768, 256)
    assert choose_adapter_backend(small) == "reference"
    mk.prefer_backends("cpu", "triton", "cpu")
    assert choose_adapter_backend(small) == "cpu"  # Triton takes no CPU tensors
    assert automatic_backends("cpu")[-2:] == ("cpu", "reference")
    mk.prefer_backends("cpu", "reference")
    assert choose_adapter_backend(_call(12608, 768, 64)) == "reference"
    assert automatic_backends("cpu") == ("reference",)
    mk.prefer_backends("cpu")
    assert choose_adapter_backend(_call(12608, 768, 64)) == "cpu"


@pytest.mark.usefixtures("_own_order")
def test_a_preference_holds_for_every_operator() -> None:
    parameter, *rest = (torch.ones(4) for _ in range(4))
    tensors = AdamWTensors([parameter], *([each] for each in rest), [torch.zeros(())], [None], [None])
    calls: list[str] = []
    for name in ("cpu", "reference"):
        mk.prefer_backends("cpu", name)
        calls.append(MASKED_ADAMW.choose("cpu", None, tensors, AdamWOptions(0.1, 0.9, 0.999, 1e-8, 0.0)))
    assert calls == ["cpu", "reference"]


def test_a_wrong_preference_is_refused() -> None:
    with pytest.raises(ValueError, match="names: expected any of cpu, triton, cuda, reference, got 'tpu'"):
        mk.prefer_backends("cuda", "tpu")
    with pytest.raises(ValueError, match="device_type: expected 'cpu' or 'cuda', got 'gpu'"):
        mk.prefer_backends("gpu", "triton")


def test_the_environment_sets_the_order_on_cuda_devices() -> None:
    code = "from mosa_kernels.backends.lookup import preferred_backends; print(preferred_backends('cuda'))"

    def answer(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MOSA_CUDA_BACKENDS": value, "PYTHONPATH": str(Path(mk.__file__).parents[1])}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert answer("cuda, triton").stdout.strip() == "('cuda', 'triton')"
    assert answer("").stdout.strip() == "None"
    assert "MOSA_CUDA_BACKENDS: names: expected any of" in answer("tpu").stderr


def test_triton_asks_each_gpu_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    class OnGPU(torch.Tensor):
        is_cuda, index = True, 0

        def get_device(self) -> int:
            return self.index

    capabilities = [(8, 0), (7, 5)]
    monkeypatch.setattr(triton, "_INTERPRETING", False)
    monkeypatch.setattr(triton, "_too_old", ())
    monkeypatch.setattr(triton, "takes", lambda args: (True, ""))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert triton._look() == (True, "")
    args = _call(5, 24, 6)
    newer, older = (args.x.clone().as_subclass(OnGPU) for _ in range(2))
    older.index = 1
    assert triton.supports_adapter(args._replace(x=newer))[0]
    ok, reason = triton.supports_adapter(args._replace(x=older))
    assert not ok
    assert "below 8.0" in reason
    del capabilities[0]
    assert triton._look() == (False, "needs compute capability 8.0, this machine has [(7, 5)]")
