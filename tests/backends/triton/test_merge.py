"""The merge in Triton against its definition in float64, on a GPU or interpreted on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from merges import DTYPES, assert_close, oracle, random_adapter
from poison import poisoned_memory
from torch import Tensor

from mosa_kernels.backends import merge as reference
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.functional.merge import merge_adapters

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import merge as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1 (as test_interpreted_operators.py sets it)",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
WRITTEN = tuple(dtype for dtype in DTYPES if not INTERPRETED or dtype != torch.bfloat16)
"""The interpreter cuts bf16 off where a GPU rounds to nearest: there, bf16 is read but not written."""


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    with poisoned_memory():
        yield


def test_tables_are_not_poisoned() -> None:
    """Pinned for a GPU, they are integers, which hold no NaN."""
    assert torch.empty(2).isnan().all()
    assert torch.empty(2, dtype=torch.int64).shape == (2,)


def moved(adapter: MergeInput) -> MergeInput:
    return MergeInput(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in adapter))


def merge(adapters: list[MergeInput], fold_norm: bool = True, dtype: torch.dtype | None = None) -> list[MergedWeights]:
    merged = merge_adapters([moved(a) for a in adapters], fold_norm=fold_norm, dtype=dtype, backend="triton")
    return [MergedWeights(*(None if t is None else t.cpu() for t in one)) for one in merged]


@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(WRITTEN)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    without=st.lists(st.sampled_from(["b_down", "b_up", "norm_weight", "norm_bias"]), unique=True),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(sizes, dtypes, flags, without, seed) -> None:
    (d, r, experts), (dtype, out_dtype) = sizes, dtypes
    shared_bias, sparse_down, fold_norm, learned_scale = flags
    adapter = random_adapter(
        d, r, experts, dtype, seed, shared_bias=shared_bias, sparse_down=sparse_down, without=tuple(without)
    )
    if learned_scale:
        adapter = adapter._replace(scale=torch.tensor(0.37, dtype=dtype))
    (got,) = merge([adapter], fold_norm, out_dtype)
    assert_close(got, oracle(adapter, fold_norm), adapter, out_dtype)


@pytest.mark.parametrize("out_dtype", WRITTEN)
def test_all_adapters_of_a_model_in_one_launch(out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide beside narrow ones, rows longer than a block, some stored transposed or row-strided, and every dtype."""
    shapes = [(33 + 7 * n % 50, 1 + n % 9, 1 + n % 4) for n in range(12)] + [(1100, 3, 3), (20, 66, 2), (1, 1, 1)]
    adapters = [random_adapter(*shape, DTYPES[n % 3], seed=n) for n, shape in enumerate(shapes)]
    adapters[3] = adapters[3]._replace(w_up=adapters[3].w_up.t().contiguous().t())
    wide = torch.randn(shapes[4][1], 2 * shapes[4][0])
    adapters[4] = adapters[4]._replace(w_down=wide[:, : shapes[4][0]], b_up=wide[0, ::2].double().float())
    adapters[5] = adapters[5]._replace(w_down=wide[:1, :1].expand(shapes[5][1], shapes[5][0]))
    adapters[6] = random_adapter(*shapes[6], seed=6, sparse_down=True)._replace(up_factor=1.0, down_factor=1.0)
    launches: list[int] = []
    monkeypatch.setattr(kernels.Launch, "run", counted(kernels.Launch.run, launches))
    results = merge(adapters, True, out_dtype)
    assert len(launches) == 1
    for adapter, got in zip(adapters, results, strict=True):
        assert_close(got, oracle(adapter, True), adapter, out_dtype)


def counted(run, launches: list[int]):
    def counting(self) -> None:
        launches.append(1)
        run(self)

    return counting


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_conversions_are_those_of_pytorch(half: torch.dtype) -> None:
    """Every 16-bit pattern to fp32, bit for bit; the interpreter misreads subnormal bf16."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).reshape(64, 1024)
    zeros = torch.zeros(1024, 64, dtype=half)
    (merged,) = merge([MergeInput(narrow, None, zeros, None)], True, torch.float32)
    same = merged.w_down.view(torch.int32) == narrow.float().view(torch.int32)
    misread = INTERPRETED and half == torch.bfloat16
    judged = ~narrow.isnan() & ((narrow.abs() >= torch.finfo(half).smallest_normal) | (narrow == 0) | (not misread))
    assert same[judged].all()
    assert judged.sum() > 60000
    assert merged.w_down[narrow.isnan()].isnan().all()


def test_the_result_is_that_of_pytorch() -> None:
    """Nothing but the sum over the width may differ, and that by its rounding."""
    adapters = [random_adapter(96, 6, 4, seed=n, sparse_down=n == 1) for n in range(2)]
    for got, want in zip(merge(adapters), reference.merge(adapters, True, None), strict=True):
        torch.testing.assert_close(got.w_down, want.w_down, rtol=2.0**-22, atol=2.0**-22)
        torch.testing.assert_close(got.w_up, want.w_up, rtol=2.0**-22, atol=0)
        torch.testing.assert_close(got.b_up, want.b_up, rtol=2.0**-21, atol=2.0**-24)
        torch.testing.assert_close(got.b_down, want.b_down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("repeats", [pytest.param(3 if INTERPRETED else 200, id="repeats")])
def test_repeats_bitwise(repeats: int) -> None:
    adapter = random_adapter(*((300, 3, 4) if INTERPRETED else (768, 64, 4)))
    first, *others = [merge([adapter])[0] for _ in range(repeats)]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_what_is_declined_says_why() -> None:
    with pytest.raises(ValueError, match=r"'triton' does not take this call: adapters\[0\].w_down is torch.float64"):
        merge([random_adapter(5, 3, 2, torch.float64)])
    with pytest.raises(ValueError, match="the kernels write float32, float16, bfloat16, not torch"):
        merge([random_adapter(5, 3, 2)], dtype=torch.float64)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no graphs")
def test_a_captured_merge_reads_the_weights_anew() -> None:
    adapters = [moved(random_adapter(96, 16, 4, seed=n)) for n in range(3)]
    kernels.merge(adapters, True, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = kernels.merge(adapters, True, None)
    for _ in range(3):
        for adapter in adapters:
            adapter.w_up.normal_()
        graph.replay()
        for got, want in zip(merged, kernels.merge(adapters, True, None), strict=True):
            assert torch.equal(got.w_up, want.w_up)
