"""The merge against its definition in float64: in PyTorch, in C++, and in CUDA compiled for the host."""

from __future__ import annotations

from types import ModuleType

import cuda_on_host
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merges import DTYPES, assert_close, oracle, owners, random_adapter
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends import merge as reference
from mosa_kernels.backends.merge import MergedWeights, MergeInput
from mosa_kernels.backends.merge_kernels import describe, empty_outputs
from mosa_kernels.functional.merge import merge_adapters

built = extension()


def described(
    module: ModuleType, adapter: MergeInput, fold_norm: bool, out: MergedWeights, keep_alive: list[Tensor]
) -> object:
    return module.MergeAdapter(**describe(adapter, fold_norm, out, keep_alive)._asdict())


def merge_by_cuda_on_host(adapters, fold_norm=True, dtype=None) -> list[MergedWeights]:
    """The CUDA kernel behind the very descriptors that a GPU would get."""
    module = cuda_on_host.build("merge")
    outputs = [empty_outputs(a, fold_norm, dtype or a.w_down.dtype) for a in adapters]
    keep_alive: list[Tensor] = []
    table = [
        module.MergeAdapter(**describe(a, fold_norm, out, keep_alive)._asdict())
        for a, out in zip(adapters, outputs, strict=True)
    ]
    module.merge_cuda(table, 0, 0)
    return outputs


def merge_by_cpu(adapters, fold_norm=True, dtype=None) -> list[MergedWeights]:
    return merge_adapters(adapters, fold_norm=fold_norm, dtype=dtype, backend="cpu")


def merge_by_reference(adapters, fold_norm=True, dtype=None) -> list[MergedWeights]:
    return merge_adapters(adapters, fold_norm=fold_norm, dtype=dtype, backend="reference")


needs_cpu = pytest.mark.skipif(built.module is None, reason=str(built.reason))
needs_compiler = pytest.mark.skipif(cuda_on_host.find_compiler() is None, reason="no C++ compiler")
BACKENDS = [
    pytest.param(merge_by_reference, id="reference"),
    pytest.param(merge_by_cpu, id="cpu", marks=needs_cpu),
    pytest.param(merge_by_cuda_on_host, id="cuda_on_host", marks=needs_compiler),
]


@pytest.mark.parametrize("merge", BACKENDS)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 5)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from((*DTYPES, None))),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    without=st.lists(st.sampled_from(["b_down", "b_up", "norm_weight", "norm_bias"]), unique=True),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(merge, sizes, dtypes, flags, without, seed) -> None:
    (d, r, experts), (dtype, out_dtype) = sizes, dtypes
    shared_bias, sparse_down, fold_norm, learned_scale = flags
    adapter = random_adapter(
        d, r, experts, dtype, seed, shared_bias=shared_bias, sparse_down=sparse_down, without=tuple(without)
    )
    if learned_scale:
        adapter = adapter._replace(scale=torch.tensor(0.37, dtype=dtype))
    (got,) = merge([adapter], fold_norm, out_dtype)
    assert_close(got, oracle(adapter, fold_norm), adapter, out_dtype or dtype)


@pytest.mark.parametrize("merge", BACKENDS)
@pytest.mark.parametrize("rule", ["mean", "jigsaw"])
@pytest.mark.parametrize("sparse_down", [False, True])
def test_merged_layer_is_the_mean_or_the_union_of_its_experts(merge, rule: str, sparse_down: bool) -> None:
    """Eq. 7 and 8 from the experts' own masked weights: no factor of the rule enters here."""
    d, r, experts, g = 24, 6, 3, torch.Generator().manual_seed(1)
    a = random_adapter(d, r, experts, seed=5, sparse_down=sparse_down)
    factor = 1 / experts if rule == "mean" else 1.0
    a = a._replace(up_factor=factor, down_factor=factor)
    up_owner, down_owner = owners(d, r, experts, g), owners(r, d, experts, g)
    assert a.b_up is not None
    masked_up = [torch.where(up_owner == e, a.w_up, 0).double() for e in range(experts)]
    w_up = sum(masked_up) / experts if rule == "mean" else sum(masked_up)
    w_down = a.w_down.double()
    if sparse_down:
        initial = a.w_down_init.double()
        own = [torch.where(down_owner == e, w_down - initial, 0) for e in range(experts)]
        w_down = initial + (sum(own) / experts if rule == "mean" else sum(own))
    x = torch.randn(50, d, generator=g, dtype=torch.float64)
    u = torch.nn.functional.layer_norm(x, (d,), a.norm_weight.double(), a.norm_bias.double(), 1e-6)
    bottleneck = torch.nn.functional.gelu(u @ w_down.T + a.b_down.double())
    want = float(a.scale) * (bottleneck @ w_up.T + a.b_up.double().mean(0))

    (merged,) = merge([a])
    plain = torch.nn.functional.layer_norm(x, (d,), eps=1e-6)
    dense = torch.nn.functional.gelu(plain @ merged.w_down.double().T + merged.b_down.double())
    got = dense @ merged.w_up.double().T + merged.b_up.double()
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("merge", BACKENDS)
@pytest.mark.parametrize("name", ["w_down", "w_down_init", "w_up", "b_up"])
def test_rows_that_lie_apart(merge, name: str) -> None:
    adapter = random_adapter(19, 5, 3, sparse_down=True, seed=4)
    apart = torch.nn.functional.pad(getattr(adapter, name), (2, 5), value=torch.nan)[:, 2:-5]
    assert not apart.is_contiguous()
    (got,) = merge([adapter._replace(**{name: apart})])
    assert_close(got, oracle(adapter, True), adapter, torch.float32)


@pytest.mark.parametrize("merge", BACKENDS)
def test_many_adapters_of_different_shapes(merge) -> None:
    """More than one launch holds, wide beside narrow ones, some stored transposed, row-strided or in another dtype."""
    shapes = [(33 + 7 * n % 50, 1 + n % 9, 1 + n % 4) for n in range(61)]
    adapters = [random_adapter(*shape, DTYPES[n % 3], seed=n) for n, shape in enumerate(shapes)]
    adapters[3] = adapters[3]._replace(w_up=adapters[3].w_up.t().contiguous().t())
    wide = torch.randn(shapes[4][1], 2 * shapes[4][0])
    adapters[4] = adapters[4]._replace(w_down=wide[:, : shapes[4][0]], b_up=wide[0, ::2].double().float())
    adapters[5] = adapters[5]._replace(w_down=wide[:1, :1].expand(shapes[5][1], shapes[5][0]))
    for adapter, got in zip(adapters, merge(adapters, True, torch.float32), strict=True):
        assert_close(got, oracle(adapter, True), adapter, torch.float32)


@pytest.mark.parametrize("merge", BACKENDS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_conversions_are_those_of_pytorch(merge, half: torch.dtype) -> None:
    """Every 16-bit pattern to fp32, and many fp32 patterns to 16 bits, bit for bit."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half).reshape(256, 256)
    g = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (512, 256), generator=g).to(torch.int32).view(torch.float32)
    near_half = (narrow.float().view(torch.int32) + torch.randint(-1, 2, (256, 256), generator=g)).to(torch.int32)
    between = narrow.float().view(torch.int32) + (0x1000 if half == torch.float16 else 0x8000)  # ties
    wide = torch.cat([patterns, near_half.view(torch.float32), between.to(torch.int32).view(torch.float32)]).T
    for w_down, dtype in ((narrow, torch.float32), (wide.contiguous(), half)):
        zeros = torch.zeros(w_down.shape[::-1], dtype=w_down.dtype)
        (merged,) = merge([MergeInput(w_down, None, zeros, None)], True, dtype)
        want, got = w_down.to(dtype), merged.w_down
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        same = (got.view(integer) == want.view(integer)) | (got.isnan() & want.isnan())
        assert same.all()


@needs_cpu
@pytest.mark.parametrize("merge", [merge_by_cpu, pytest.param(merge_by_cuda_on_host, marks=needs_compiler)])
def test_repeats_bitwise(merge) -> None:
    adapter = random_adapter(768, 64, 4)
    first, *others = [merge([adapter])[0] for _ in range(3)]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@needs_cpu
def test_thread_count_does_not_change_the_result() -> None:
    adapters = [random_adapter(256, 32, 4, seed=n) for n in range(8)]
    module, results = extension().module, []
    assert module is not None
    for threads in (1, 2, 7):
        outputs = [empty_outputs(a, True, torch.float32) for a in adapters]
        keep_alive: list[Tensor] = []
        pairs = zip(adapters, outputs, strict=True)
        module.merge_cpu([described(module, a, True, out, keep_alive) for a, out in pairs], threads)
        results.append(outputs)
    for outputs in results[1:]:
        for one, other in zip(results[0], outputs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("merge", BACKENDS)
def test_leaves_inputs_alone_and_makes_new_tensors(merge) -> None:
    adapter = MergeInput(
        torch.nn.Parameter(torch.ones(3, 5)), None, torch.nn.Parameter(torch.ones(5, 3)), None, up_factor=1.0
    )
    (merged,) = merge([adapter])
    merged.w_down.zero_()
    merged.w_up.zero_()
    assert torch.equal(adapter.w_down, torch.ones(3, 5))
    assert torch.equal(adapter.w_up, torch.ones(5, 3))
    assert merged.b_down is None
    assert merged.b_up is None


def test_order_of_the_results_and_no_adapters() -> None:
    adapters = [random_adapter(5 + n, 2, 2, seed=n) for n in range(4)]
    assert [m.w_down.shape[1] for m in merge_adapters(adapters)] == [5, 6, 7, 8]
    assert merge_adapters([]) == []


def test_float64_is_merged_in_float64() -> None:
    adapter = random_adapter(9, 3, 2, torch.float64)
    (merged,) = merge_adapters([adapter])
    want = oracle(adapter, True)
    for got, expected in zip(merged, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_subclasses_and_meta_tensors_take_the_reference() -> None:
    adapter = random_adapter(9, 3, 2)
    on_meta = MergeInput(*(v.to("meta") if isinstance(v, Tensor) else v for v in adapter))
    (merged,) = merge_adapters([on_meta])
    assert merged.w_down.is_meta


@needs_compiler
@pytest.mark.slow
def test_a_broken_kernel_is_found() -> None:
    """A test of these tests: without its barrier the block's sum reads partial sums that are not there yet."""
    broken = cuda_on_host.build("merge", {"merge.cu": ("__syncthreads();", "")})
    adapter = random_adapter(300, 2, 2)
    out, keep_alive = empty_outputs(adapter, True, torch.float32), []
    broken.merge_cuda([described(broken, adapter, True, out, keep_alive)], 0, 0)
    with pytest.raises(AssertionError, match="b_down: off by"):
        assert_close(out, oracle(adapter, True), adapter, torch.float32)


BAD = [
    ({"w_down": torch.zeros(3)}, ValueError, r"adapters\[1\].w_down: expected shape \[r, d\], got \[3\]"),
    ({"b_down": torch.zeros(4)}, ValueError, r"b_down: expected shape \[3\], got \[4\]"),
    ({"w_up": torch.zeros(3, 5)}, ValueError, r"w_up: expected shape \[5, 3\], got \[3, 5\]"),
    ({"b_up": torch.zeros(2, 4)}, ValueError, r"b_up: expected shape \[5\] or \[N, 5\], got \[2, 4\]"),
    ({"norm_weight": torch.zeros(3)}, ValueError, r"norm_weight: expected shape \[5\], got \[3\]"),
    ({"w_down_init": torch.zeros(5, 3)}, ValueError, r"w_down_init: expected shape \[3, 5\], got \[5, 3\]"),
    ({"scale": torch.zeros(1)}, ValueError, r"scale: expected shape \[\], got \[1\]"),
    ({"w_up": torch.zeros(5, 3, dtype=torch.int8)}, TypeError, "w_up: expected a floating-point tensor"),
    ({"w_up": None}, TypeError, r"adapters\[1\].w_up: expected a floating-point tensor, got NoneType"),
    ({"w_down": [[1.0]]}, TypeError, r"adapters\[1\].w_down: expected a floating-point tensor, got list"),
    ({"b_down": 0.5}, TypeError, r"adapters\[1\].b_down: expected a floating-point tensor, got float"),
    ({"scale": None}, TypeError, r"adapters\[1\].scale: expected a number, got NoneType"),
    ({"up_factor": "mean"}, TypeError, r"adapters\[1\].up_factor: expected a number, got str"),
    ({"down_factor": torch.ones(2)}, ValueError, r"adapters\[1\].down_factor: expected shape \[\], got \[2\]"),
    ({"b_up": torch.zeros(5, device="meta")}, ValueError, r"b_up: expected on cpu \(as w_down\), got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message) -> None:
    adapters = [random_adapter(5, 3, 2), random_adapter(5, 3, 2)._replace(**change)]
    with pytest.raises(error, match=message):
        merge_adapters(adapters)


def test_bad_options_are_named() -> None:
    adapter = random_adapter(5, 3, 2)
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype"):
        merge_adapters([adapter], dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype: expected a floating-point dtype or None, got 'float16'"):
        merge_adapters([adapter], dtype="float16")
    with pytest.raises(TypeError, match=r"adapters\[0\]: expected a MergeInput, got Tensor"):
        merge_adapters(adapter)
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, triton, cuda or None, got 'tpu'"):
        merge_adapters([adapter], backend="tpu")
    with pytest.raises(ValueError, match="backend: 'cuda' does not take this call: "):
        merge_adapters([adapter], backend="cuda")


@needs_cpu
def test_an_unsupported_call_by_name_says_why() -> None:
    with pytest.raises(ValueError, match=r"adapters\[0\].w_down is torch.float64; the kernels take float32, float16"):
        merge_adapters([random_adapter(5, 3, 2, torch.float64)], backend="cpu")


@needs_compiler
def test_launch_errors_name_launch_shape_and_cause() -> None:
    module = cuda_on_host.build("merge")
    adapter = random_adapter(5, 3, 2)
    out, keep_alive = empty_outputs(adapter, True, torch.float32), []
    nowhere = out._replace(w_up=None)
    table = [described(module, adapter, True, nowhere, keep_alive)]
    with pytest.raises(RuntimeError, match=r"merge_cuda of 1 adapters, .* w_down \[3, 5\], failed: a required tensor"):
        module.merge_cuda(table, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_as_on_the_host() -> None:
    adapters = [random_adapter(768, 64, 4, DTYPES[n % 3], seed=n) for n in range(30)]
    moved = [MergeInput(*(v.cuda() if isinstance(v, Tensor) else v for v in a)) for a in adapters]
    for a, got, want in zip(
        adapters, merge_adapters(moved, backend="cuda"), reference.merge(adapters, True, None), strict=True
    ):
        host = MergedWeights(*(None if t is None else t.cpu() for t in got))
        wide = MergedWeights(*(None if t is None else t.double() for t in oracle(a, True)))
        assert [t.dtype for t in host] == [t.dtype for t in want]
        assert_close(host, wide, a, a.w_down.dtype)


@needs_cpu
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_every_float_is_rounded_as_pytorch_does(half):
    """Up-projections that the merge only converts: each pattern of bits, and floats at and beside each edge."""

    def converted(w_up: Tensor, dtype: torch.dtype) -> Tensor:
        width, rank = w_up.shape
        adapter = MergeInput(torch.zeros(rank, width, dtype=w_up.dtype), None, w_up, None)
        return merge_by_cpu([adapter], dtype=dtype)[0].w_up

    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).reshape(-1, 32)
    values = halves.float()
    torch.testing.assert_close(converted(halves, torch.float32), values, rtol=0, atol=0, equal_nan=True)

    nonnegative = values.flatten().sort().values
    nonnegative = nonnegative[(nonnegative >= 0) & nonnegative.isfinite()]
    edges = nonnegative[:-1] + nonnegative.diff() / 2  # halfway between neighbours: to even
    top = torch.tensor([torch.finfo(half).max]) * torch.tensor([1, 1 + 2**-9, 1 + 2**-8, 1 + 2**-7, 2**0.1])
    floats = torch.cat([edges, top, torch.tensor([float("inf"), float("nan"), 1e-45])])
    floats = torch.cat([floats, floats.nextafter(torch.zeros(())), floats.nextafter(torch.tensor(float("inf")))])
    floats = torch.stack([floats, -floats], 1)
    torch.testing.assert_close(converted(floats, half), floats.to(half), rtol=0, atol=0, equal_nan=True)
