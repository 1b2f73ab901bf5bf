"""Which backend runs a call."""

from __future__ import annotations

import pytest
import torch

import mosa_kernels as mk
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.choice import BACKENDS, NOT_BUILT, choose_adapter_backend


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
    with pytest.raises(ValueError, match="backend: 'cuda' is not available"):
        choose_adapter_backend(_call(5, 8, 4), "cuda")
    with pytest.raises(ValueError, match=r"backend: expected one of .* got 'tpu'"):
        choose_adapter_backend(_call(5, 8, 4), "tpu")


def test_every_backend_is_available_or_says_why_not() -> None:
    found = mk.available_backends()
    assert found.keys() == {*BACKENDS, *NOT_BUILT}
    assert found["reference"] is True
    assert found["cpu"] is True
    for answer in found.values():
        assert answer is True or (isinstance(answer, str) and len(answer) > 10)
