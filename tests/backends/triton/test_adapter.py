"""The Triton kernels against the float64 oracle, on a GPU or, with TRITON_INTERPRET=1, interpreted on the CPU.

The interpreter multiplies the raw bits of bf16 operands, so that bf16 is checked on a GPU only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from itertools import product
from typing import Any

import pytest
import torch
from accuracy import Expected, all_needs, argument, check_nans, on, well_conditioned
from calls import call_of_no_expert, call_with_nan, far_apart, full_call, hard_tokens, sparse_down
from cases import adapter_calls
from hypothesis import Phase, assume, given, settings
from poison import poisoned_memory
from torch import Tensor

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.triton import backend
from mosa_kernels.functional.adapter import mosa_adapter
from mosa_kernels.functional.split import split

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import (
    adapter_backward,
    adapter_backward_together,
    adapter_forward,
    adapter_units,
    configs,
    launch,
    plan,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1 (as test_interpreter.py sets it)",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16) + (() if INTERPRETED else (torch.bfloat16,))
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no streams, graphs or races")


def run(args: AdapterArguments, grad_out: Tensor, needs: AdapterNeeds | None = None) -> tuple[Tensor, AdapterGradients]:
    ok, reason = backend.supports_adapter(args)
    assert ok, reason
    with poisoned_memory():
        out, mean, rstd = backend.adapter_forward(args)
        assert out.is_contiguous()
        assert mean.shape == rstd.shape == ((args.x.numel() // args.width,) if args.norm_weight is not None else (0,))
        return out, backend.adapter_backward(args, grad_out, mean, rstd, needs or all_needs(args))


def check(args: AdapterArguments, grad_out: Tensor | None = None) -> AdapterGradients:
    if grad_out is None:
        generator = torch.Generator().manual_seed(1)
        grad_out = torch.randn(args.x.shape, generator=generator).to(args.x)
    expected = Expected(args, grad_out)
    out, gradients = run(args, grad_out)
    expected.check_out(out)
    expected.check_gradients(gradients)
    if args.activity is not None:
        assert torch.equal(gradients.activity, expert_activity(args))
    return gradients


def call(*sizes: Any, **options: Any) -> AdapterArguments:
    """`full_call` where the kernels run."""
    return on(full_call(*sizes, **options), DEVICE)


# Shrinking would take minutes in the interpreter; on a GPU every shape is compiled first.
@settings(max_examples=40 if INTERPRETED else 15, phases=[Phase.explicit, Phase.generate])
@given(adapter_calls(dtypes=DTYPES))
def test_any_call(args: AdapterArguments) -> None:
    check(on(well_conditioned(args), DEVICE))


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(args=adapter_calls(dtypes=DTYPES, max_width=40, min_bottleneck=33, max_bottleneck=256, max_tokens=12))
def test_any_call_with_a_wide_bottleneck(args: AdapterArguments) -> None:
    assume(min(args.width, args.x.numel() // args.width) >= 6)
    check(on(args._replace(activation="silu") if args.activation == "relu" else args, DEVICE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["x", "b_down"])
def test_nan_is_not_hidden(where: str, activation: str) -> None:
    args = on(call_with_nan(where, activation), DEVICE)
    out, gradients = run(args, torch.ones_like(args.x))
    check_nans(args, out, gradients.x)


@pytest.mark.parametrize("r", [129, 256])
def test_float32_with_a_wide_sparse_down_projection(r: int) -> None:
    check(call(1, 20, 40, r, expert=torch.tensor(2), **sparse_down(40, r)))


def test_rows_further_apart_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_WIDEST_ROW", 2**40)  # or the rows would be copied
    near, far, grad_out = far_apart(full_call(1, 4, 32, 8, torch.float16, expert=torch.tensor(1)), DEVICE)
    expected = run(near, grad_out.contiguous())
    found = run(far, grad_out)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize(
    ("batch", "length", "d", "r"), [(1, 1, 16, 1), (3, 50, 80, 20), (1, 150, 100, 65), (1, 5, 40, 200)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_several_tiles(batch: int, length: int, d: int, r: int, dtype: torch.dtype) -> None:
    check(call(batch, length, d, r, dtype, expert=torch.tensor(2)))


@pytest.mark.parametrize(
    ("ids", "length"), [((0, 1, -1, 3, 1), 1), ((0, 1, -1, 3, 1), 14), ((-1, 0, 0), 30), ((2, 2), 3)]
)
@pytest.mark.parametrize("sparse", ["up", "both"])
def test_experts_mixed_with_the_merged_adapter(ids: tuple[int, ...], length: int, sparse: str) -> None:
    options = {} if sparse == "up" else sparse_down(48, 8)
    args = call(len(ids), length, 48, 8, expert=torch.tensor(ids), expert_scale=4.0, merged_scale=0.25, **options)
    gradients = check(args)
    absent = [n for n in range(4) if n not in ids and -1 not in ids]
    for n in absent:
        assert not gradients.b_up[n].any()
        assert not gradients.w_up[args.assignment == n].any()
    for n in set(range(4)) - set(absent):
        assert gradients.b_up[n].abs().mean() > 1e-3
        assert gradients.w_up[args.assignment == n].abs().mean() > 1e-3


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    check(call(3, 7, 24, 6, expert=torch.tensor([2, 0, 3], dtype=dtype)))
    check(call(1, 7, 24, 6, expert=torch.tensor(2, dtype=dtype)))


def before_an_unmapped_page(values: list[int]) -> Tensor:
    """int64 numbers behind which no memory is: whoever reads on is ended."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof((ctypes.c_char * (2 * page)).from_buffer(pages))
    numbers = torch.frombuffer(pages, dtype=torch.int64, count=len(values), offset=page - 8 * len(values))
    numbers.copy_(torch.tensor(values))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), page, 0) == 0
    return numbers


@pytest.mark.skipif(not INTERPRETED or sys.platform != "linux", reason="the seeds lie in the host's memory")
@pytest.mark.parametrize("seeds", [[5, 2**40 + 1, 7], [11]])
def test_no_seed_is_read_beyond_the_last(seeds: list[int]) -> None:
    args = call(
        3, 19, 32, 12, dropout_p=0.4, seed=before_an_unmapped_page(seeds)
    )  # 57 tokens: the last tile is partial
    check(args)


def test_dropout_with_a_seed_for_each_sample() -> None:
    seeds = torch.tensor([5, 2**40 + 1, 2**62])
    for seed in (None, seeds, seeds[1]):
        check(call(3, 20, 32, 12, dropout_p=0.4, seed=seed, seed_id=2**35 + 17))


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_autocast_multiplies_in_half_and_keeps_float32(dtype: torch.dtype) -> None:
    check(call(2, 30, 64, 16, compute_dtype=dtype, expert=torch.tensor([1, -1])))
    check(call(2, 30, 64, 16, dtype=dtype, parameter_dtype=torch.float32, compute_dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_columns_and_a_mean_far_from_zero(dtype: torch.dtype) -> None:
    x = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(3))
    x[..., [0, 17, 60]] *= 100
    check(call(2, 20, 96, 16, dtype, x=x.to(dtype).requires_grad_()))
    shifted = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(4)) + 30
    check(call(2, 20, 96, 16, dtype, x=shifted.to(dtype).requires_grad_()))
    if dtype != torch.float32:
        check(call(2, 20, 96, 16, x=shifted.requires_grad_(), compute_dtype=dtype))


def test_statistics_survive_a_large_mean() -> None:
    x = torch.randn(1, 9, 200, generator=torch.Generator().manual_seed(6)) + 1000
    args = call(1, 9, 200, 4, x=x)
    _, mean, rstd = backend.adapter_forward(args)
    exact = x.double().view(9, 200)
    torch.testing.assert_close(mean.cpu().double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.cpu().double(), (exact.var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-4, atol=0)


def test_gradients_of_many_tokens_are_as_accurate_as_eager() -> None:
    """A bias's is a sum of every token, which eager PyTorch takes in stages."""
    args = on(full_call(1, 3000, d=32, r=64, activity=None), DEVICE)
    grad_out = torch.randn(args.x.shape, generator=torch.Generator().manual_seed(7)).to(args.x) + 1
    Expected(args, grad_out).check_long_sums(run(args, grad_out)[1])


def test_only_the_gradients_asked_for() -> None:
    args = call(2, 9, 24, 6, expert=torch.tensor([1, 3]), scale_tensor=torch.tensor(0.7, requires_grad=True))
    grad_out = torch.randn(args.x.shape, device=DEVICE)
    _, full = run(args, grad_out)
    wishes = [{name} for name in AdapterNeeds._fields] + [{"x", "w_up"}, {"w_down", "activity"}, {"b_down", "scale"}]
    for wish in wishes:
        _, found = run(args, grad_out, AdapterNeeds(*(name in wish for name in AdapterNeeds._fields)))
        for name in AdapterNeeds._fields:
            gradient = getattr(found, name)
            assert (gradient is not None) == (name in wish), name
            if gradient is not None:
                torch.testing.assert_close(gradient, getattr(full, name), rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.randn(2, 21, 72, generator=torch.Generator().manual_seed(7))
    for x in (wide[..., 8:56], wide[:, 1:, :48], wide.transpose(0, 1)[..., ::2][..., :32].transpose(0, 1)):
        args = call(2, x.shape[1], x.shape[2], 8)._replace(x=x.to(DEVICE).detach().requires_grad_())
        args = args._replace(residual=x.to(DEVICE) * 2)
        check(args)
        check(args, torch.tensor(0.25, device=DEVICE).expand(x.shape))


def test_addresses_that_are_not_aligned() -> None:
    base = torch.randn(1 + 2 * 10 * 33, generator=torch.Generator().manual_seed(8)).to(DEVICE)
    check(call(2, 10, 33, 5)._replace(x=base[1:].view(2, 10, 33).requires_grad_()))


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass over tokens and weights in one launch, as far as it goes."""
    monkeypatch.setattr(configs, "ONE_LAUNCH", 64)


@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(args=adapter_calls(dtypes=DTYPES))
def test_any_call_in_one_launch(args: AdapterArguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "ONE_LAUNCH", 64)
        check(on(well_conditioned(args), DEVICE))


@pytest.mark.usefixtures("one_launch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [(2,), (0, 1, -1, 1)], ids=str)
def test_one_launch_over_several_tiles(
    ids: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[object] = []
    run_one = adapter_backward_together.together_launch
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(adapter_backward, "together_launch", lambda *args: launched.append(args) or run_one(*args))
    scale = torch.tensor(0.7, requires_grad=True)
    options = {"scale_tensor": scale, "dropout_p": 0.3, "expert": torch.tensor(ids), "expert_scale": 4.0}
    check(call(len(ids), 33, 80, 20, dtype, **options))
    check(call(len(ids), 17, 40, 12, dtype, **options, **sparse_down(40, 12)))
    assert len(launched) == 2


WHOLE_UNITS = [
    # d, r, experts; 4 x 32 units, three unequal experts, and several tiles of columns
    (32, 128, 4),
    (17, 70, 3),
    (70, 80, 8),
]


@pytest.mark.parametrize(("d", "r", "n"), WHOLE_UNITS)
@pytest.mark.parametrize("ids", [(1,), (0, 1, -1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_own_whole_units(d: int, r: int, n: int, ids: tuple[int, ...], dtype: torch.dtype) -> None:
    options = {
        "assignment": split((d, r), n, "column", torch.Generator().manual_seed(2)),
        "expert": torch.tensor(ids[0] if len(ids) == 1 else ids),
        "dropout_p": 0.2,
        "seed_id": 3,
        "expert_scale": float(n),
        "merged_scale": 0.5,
    }
    args = call(len(ids), 19, d, r, dtype, n=n, **options)
    lists = adapter_units.lists_for(args)
    assert lists is not None
    assert lists.shape == (n, max(16, 1 << (-(-r // n) - 1).bit_length()))
    check(args)


def test_whole_units_with_other_options() -> None:
    whole = {"assignment": split((24, 80), 4, "column"), "expert": torch.tensor([3, 0, -1])}
    scale = torch.tensor(0.7, requires_grad=True)
    check(call(3, 5, 24, 80, **whole, scale_tensor=scale, **sparse_down(24, 80)))
    check(call(3, 5, 24, 80, **whole, norm_weight=None, norm_bias=None, b_up=None, b_down=None, activation="relu"))
    check(call(3, 1, 24, 80, **{**whole, "expert": None}, expert_id=2))
    args = call(3, 20, 24, 80, **{**whole, "expert": torch.tensor([0, 2, 2])}, scale_tensor=scale)
    grad_out = torch.randn(args.x.shape, device=DEVICE)
    _, full = run(args, grad_out)
    for wish in ({"w_up"}, {"w_down", "b_down"}):
        _, found = run(args, grad_out, AdapterNeeds(*(name in wish for name in AdapterNeeds._fields)))
        for name in wish:
            torch.testing.assert_close(getattr(found, name), getattr(full, name), rtol=1e-5, atol=1e-5)


def test_units_that_several_experts_share_in_part() -> None:
    """An expert that owns one entry of a unit has it listed, an expert without entries has nothing listed."""
    assignment = torch.full((24, 80), 1, dtype=torch.uint8)
    assignment[:, :20] = 0
    assignment[:, 40:] = 4
    assignment[5, 3] = assignment[7, 40] = 2
    args = call(5, 9, 24, 80, n=6, assignment=assignment, expert=torch.tensor([0, 2, 5, 4, 3]))
    lists = adapter_units.lists_for(args)
    assert lists is not None
    assert [int((row < 80).sum()) for row in lists] == [20, 20, 2, 0, 40]
    assert lists[2, :2].tolist() == [3, 40]
    check(args)


def test_lists_of_units_follow_the_assignment() -> None:
    args = call(1, 3, 160, 80, assignment=split((160, 80), 4, "column"), expert=torch.tensor(1))
    assignment = args.assignment
    first = adapter_units.lists_for(args)
    assert first is not None
    assert adapter_units.lists_for(args) is first
    assert adapter_units.lists_for(args._replace(expert=None)) is None  # the merged adapter needs all units
    assignment.copy_(split((160, 80), 2, "column"))
    assert adapter_units.lists_for(args).shape == (2, 64)
    check(args)
    for granularity in ("element", "row", "block", "even_rows", "even_columns"):
        assignment.copy_(split((160, 80), 2, granularity))
        assert adapter_units.lists_for(args) is None, granularity
    key = id(assignment)
    assert key in adapter_units._lists.entries
    del args, assignment
    assert key not in adapter_units._lists.entries


def test_ids_and_seeds_that_are_columns_of_a_table() -> None:
    table = torch.tensor([[0, 3], [2, -1], [1, 0]])
    args = call(3, 10, 32, 6, dropout_p=0.3)._replace(seed=(table * 2**33 + 7).to(DEVICE)[:, 1])
    check(args._replace(expert=table.to(DEVICE)[:, 0]))
    check(args._replace(expert=table.to(DEVICE)[1, 0].expand(3)))


def test_ids_of_no_expert_own_nothing() -> None:
    args, padded = call_of_no_expert(torch.float32, 8)
    grad_out = torch.randn_like(args.x)
    out, gradients = run(on(args, DEVICE), grad_out.to(DEVICE))
    Expected(padded, grad_out).check_out(out.cpu())
    assert gradients.b_up is not None
    assert gradients.b_up.isfinite().all()


def test_a_narrower_residual_is_widened_as_it_is_added() -> None:
    residual = torch.randn(2, 30, 48).to(torch.float16).requires_grad_()
    check(call(2, 30, 48, 16, compute_dtype=torch.float16, residual=residual))


def test_tokens_far_from_zero_in_another_half_precision() -> None:
    """Rounded to the products' dtype as they lie in memory, they would lose what tells them apart."""
    _, shifted = hard_tokens(96, [0])
    narrow = shifted.bfloat16().requires_grad_()
    check(call(2, 20, 96, 16, torch.bfloat16, torch.float32, x=narrow, compute_dtype=torch.float16))
    for dtype, other in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        args = full_call(dtype=dtype, parameter_dtype=torch.float32)
        assert not plan.plan_of(args, 80).centre
        assert plan.plan_of(args._replace(compute_dtype=other), 80).centre


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_a_column_beyond_fp16_in_a_wider_stream(stream: torch.dtype) -> None:
    """LayerNorm makes it small before eager PyTorch rounds."""
    x = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(8))
    x[:, 3, 5], x[:, 7, 90] = 1e5, -3e5
    x = x.to(stream).requires_grad_()
    check(call(2, 20, 96, 16, stream, torch.float32, x=x, compute_dtype=torch.float16))


def test_one_token_of_each_image_makes_no_kernel_of_each_length() -> None:
    strides = {plan.rows_of(torch.randn(3, length, 48)[:, 0]).stride for length in (20, 50, 197)}
    assert strides == {48}
    wide = torch.randn(3, 7, 3 * 48)[..., 48:96]
    assert plan.rows_of(wide).stride == 144  # in place
    assert plan.rows_of(wide).data.data_ptr() == wide.data_ptr()
    check(call(3, 1, 48, 8, x=torch.randn(3, 20, 48)[:, :1].requires_grad_(), residual=None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_on_the_raw_x(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bf16 takes, in dtypes that the interpreter multiplies rightly."""

    def raw_plans(*args: Any) -> list[plan.Plan]:
        return [each._replace(raw=True, centre=False) for each in plan.plans_of(*args)]

    monkeypatch.setattr(launch, "_compiled", {})

    for module in (adapter_forward, adapter_backward):
        monkeypatch.setattr(module, "plans_of", raw_plans)
    check(call(2, 50, 48, 10, dtype, expert=torch.tensor([3, -1])))
    check(call(2, 50, 48, 10, dtype, expert=torch.tensor([3, -1]), **sparse_down(48, 10)))


def test_through_the_operator_and_autograd() -> None:
    args = call(2, 11, 40, 7, scale_tensor=torch.tensor(0.7, requires_grad=True))
    grad_out = torch.randn(args.x.shape, device=DEVICE)
    names = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "scale", "activity")

    def gradients(name: str) -> tuple[Tensor, ...]:
        out = mosa_adapter(
            args.x, args.w_down, args.b_down, args.w_up, args.b_up, args.assignment, torch.tensor([1, -1]).to(DEVICE),
            norm_weight=args.norm_weight, norm_bias=args.norm_bias, scale=args.scale_tensor, activity=args.activity,
            residual=args.residual, backend=name,
        )  # fmt: skip
        return out, *torch.autograd.grad(out, [argument(args, name) for name in names], grad_out)

    for found, wanted in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_one_graph_serves_all_experts() -> None:
    args = call(2, 11, 40, 7)
    compilations: list[object] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        compilations.append(graph)
        return graph

    def layer(x: Tensor, expert: Tensor) -> Tensor:
        return mosa_adapter(
            x, args.w_down, args.b_down, args.w_up, args.b_up, args.assignment, expert,
            norm_weight=args.norm_weight, norm_bias=args.norm_bias, backend="triton",
        )  # fmt: skip

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for ids in ((1, -1), (0, 2), (3, 3)):
        expert = torch.tensor(ids).to(DEVICE)
        assert torch.equal(compiled(args.x, expert), layer(args.x, expert))
    assert len(compilations) == 1


@settings(max_examples=150)
@given(adapter_calls(dtypes=(torch.float32, torch.float16, torch.bfloat16)))
def test_hardly_a_call_is_declined(args: AdapterArguments) -> None:
    ok, reason = backend.supports_adapter(on(args, DEVICE))
    assert ok, reason


def test_what_is_declined_says_why() -> None:
    args = call()
    wide = torch.randn(1, 1, 5000, device=DEVICE)
    for changed, reason in (
        (args._replace(x=wide), "5000"),
        (args._replace(x=args.x[:0]), "empty"),
        (args._replace(w_down=torch.randn(300, 48, device=DEVICE)), "300"),
        (args._replace(b_up=torch.randn(65, 48, device=DEVICE)), "65"),
        (args._replace(x=args.x.double()), "float64"),
        (args._replace(w_up=args.w_up.double()), "w_up"),
        (args._replace(w_up=args.w_up.T.contiguous().T), "not contiguous"),
    ):
        ok, said = backend.supports_adapter(changed)
        assert not ok
        assert reason in said


def tensors_of(out: Tensor, gradients: AdapterGradients) -> list[Tensor]:
    return [out, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the programs in an order of its own")
@pytest.mark.parametrize("ids", [(1,), (0, 3, -1, 1)], ids=str)
def test_the_order_in_which_programs_run_changes_no_bit(ids: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder as builder

    args = call(4, 70, 160, 20, torch.float16, expert=torch.tensor(ids))
    needs = all_needs(args)
    parts = plan.parts_of(args, plan.plan_of(args, 80), needs)
    assert parts.number > 2
    assert parts.column_blocks > 1
    grad_out = torch.randn(args.x.shape).to(args.x)
    first = tensors_of(*run(args, grad_out))
    place, order = builder.set_grid_idx, random.Random(0)
    programs: list[tuple[int, ...]] = []

    def another_program(*_: int) -> None:
        if not programs:
            programs.extend(product(*(range(size) for size in builder.grid_dim)))
            order.shuffle(programs)
        place(*programs.pop())

    monkeypatch.setattr(builder, "set_grid_idx", another_program)
    for _ in range(3):
        for wanted, found in zip(first, tensors_of(*run(args, grad_out)), strict=True):
            assert torch.equal(wanted, found)
        assert not programs, "a launch left programs out"


@needs_gpu
def test_two_hundred_runs_give_the_same_bits() -> None:
    ids = torch.randint(-1, 4, (16,))
    args = call(16, 197, 768, 64, torch.bfloat16, expert=ids, dropout_p=0.1, seed=torch.tensor(3))
    grad_out = torch.randn_like(args.x)
    first = tensors_of(*run(args, grad_out))
    for _ in range(200):
        for wanted, found in zip(first, tensors_of(*run(args, grad_out)), strict=True):
            assert torch.equal(wanted, found)


@needs_gpu
def test_on_another_stream() -> None:
    args = call(8, 197, 768, 64, torch.bfloat16, expert=torch.tensor(1))
    grad_out = torch.randn_like(args.x)
    wanted = tensors_of(*run(args, grad_out))
    stream = torch.cuda.Stream()
    source = args.x.detach().clone()
    late = torch.zeros_like(source)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(source)
        found = tensors_of(*run(args._replace(x=late), grad_out))
    stream.synchronize()
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_a_replayed_graph_sees_new_experts_and_values() -> None:
    expert = torch.tensor([0, 1, 2, 3])
    args = call(4, 197, 192, 16, torch.float16, expert=expert)
    grad_out = torch.randn_like(args.x)
    run(args, grad_out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, mean, rstd = backend.adapter_forward(args)
        gradients = backend.adapter_backward(args, grad_out, mean, rstd, all_needs(args))
    for ids in ((3, 3, -1, 0), (1, 2, 1, 2)):
        with torch.no_grad():
            args.expert.copy_(torch.tensor(ids))
            args.x.normal_()
        graph.replay()
        for a, b in zip(tensors_of(out, gradients), tensors_of(*run(args, grad_out)), strict=True):
            assert torch.equal(a, b)
