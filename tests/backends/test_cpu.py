"""The CPU backend against the float64 oracle, never more than twice as far from it as eager PyTorch.

Everything is asked of all its paths: the compiled kernels, those with bf16 products where the CPU has these and is
faster without them, and the tiles in PyTorch that stand in for compiled ones.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import Expected, check_nans
from calls import call_with_nan, full_call
from cases import adapter_calls
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import double, oracle_adapter
from poison import poisoned_memory
from torch import Tensor

from mosa_kernels import mosa_adapter
from mosa_kernels._extension import extension
from mosa_kernels.backends import cpu, reference
from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import MERGED, TENSORS, AdapterArguments, AdapterGradients, AdapterNeeds
from mosa_kernels.backends.cpu import backward, compiled, forward, plan
from mosa_kernels.functional.split import GRANULARITIES, split

EVERYTHING = AdapterNeeds(*(True,) * len(AdapterNeeds._fields))
SOURCES = {name: "scale_tensor" if name == "scale" else name for name in AdapterNeeds._fields if name != "activity"}
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Errors below a few units in the last place of the largest element are not compared: both sides may be exact."""


BUILT = extension().module
INSTRUCTION_SETS = {} if BUILT is None else BUILT.adapter_cpu_instruction_sets()
FASTEST = {
    dtype: None if BUILT is None else BUILT.adapter_cpu_fastest_instruction_set(bf16_products=dtype == torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16)
}


@contextmanager
def highest_instruction_set(name: str) -> Iterator[None]:
    if name not in INSTRUCTION_SETS:
        pytest.skip(f"this CPU or build has no {name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_HIGHEST_INSTRUCTION_SET", INSTRUCTION_SETS[name])
        yield


def with_bf16_products(function: Callable[..., Any]) -> Callable[..., Any]:
    return highest_instruction_set("avx512_bf16")(function)


PATHS = {
    "compiled": compiled,
    "bf16 products": SimpleNamespace(
        adapter_forward=with_bf16_products(compiled.adapter_forward),
        adapter_backward=with_bf16_products(compiled.adapter_backward),
    ),
    "tiles": SimpleNamespace(adapter_forward=forward.adapter_forward, adapter_backward=backward.adapter_backward),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "compiled" and extension().reason:
        pytest.skip(extension().reason)
    if request.param == "bf16 products":
        if "avx512_bf16" not in INSTRUCTION_SETS:
            pytest.skip("this CPU or build has no avx512_bf16")
        if FASTEST[torch.bfloat16] == "avx512_bf16":
            pytest.skip("what the compiled path runs here in bf16")
    return request.param


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(args=adapter_calls(dtypes=(torch.float32, torch.bfloat16), max_width=200, max_bottleneck=70, max_tokens=120))
def test_every_instruction_set(name: str, args: AdapterArguments) -> None:
    with highest_instruction_set(name):
        assert_as_accurate_as_eager("compiled", args)


@pytest.mark.skipif(not INSTRUCTION_SETS or not Path("/proc/cpuinfo").exists(), reason="not built, or not Linux")
@pytest.mark.parametrize("dtype", FASTEST)
def test_calls_run_with_the_fastest_instruction_set(dtype: torch.dtype) -> None:
    """For bf16 products Intel's CPUs have AMX; pairs of bf16 they multiply more slowly than floats."""
    expected = [name for name in INSTRUCTION_SETS if name != "avx512_bf16" or dtype == torch.bfloat16]
    if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
        expected = [name for name in expected if name != "avx512_bf16"]
    assert FASTEST[dtype] == expected[-1]

    args = detached(vit_like((2, 50), 96, 32, dtype))
    out, _, _ = compiled.adapter_forward(args)
    outputs = {}
    for name in INSTRUCTION_SETS:
        with highest_instruction_set(name):
            outputs[name] = compiled.adapter_forward(args)[0]
    assert torch.equal(out, outputs[expected[-1]])
    if dtype == torch.bfloat16 and "avx512_bf16" in outputs:
        assert not torch.equal(outputs["avx512"], outputs["avx512_bf16"])


def detached(args: AdapterArguments) -> AdapterArguments:
    return AdapterArguments(*(value.detach() if isinstance(value, Tensor) else value for value in args))


def run_cpu(
    path: str, args: AdapterArguments, grad_out: Tensor, needs: AdapterNeeds = EVERYTHING
) -> tuple[Tensor, AdapterGradients]:
    args = detached(args)
    with torch.no_grad():
        out, mean, rstd = PATHS[path].adapter_forward(args)
        return out, PATHS[path].adapter_backward(args, grad_out, mean, rstd, needs)


def differentiated(args: AdapterArguments, out: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    leaves = {name: getattr(args, source) for name, source in SOURCES.items() if getattr(args, source) is not None}
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def assert_as_accurate_as_eager(path: str, args: AdapterArguments, relu_is_safe: bool = False) -> None:
    """Output and all gradients: at most twice eager's largest error, and gradients of the arguments' dtypes.

    In half precision, what lies below a relu is left out: where z rounds to the other side of zero, the slope jumps.
    """
    exact_args = double(args)
    exact_out = oracle_adapter(exact_args)
    grad_out = torch.randn(args.x.shape, generator=torch.Generator().manual_seed(7)).to(args.x.dtype)
    exact = {"out": exact_out, **differentiated(exact_args, exact_out, grad_out.double())}
    eager_args = args._replace(activity=None)
    eager_out = reference.adapter(eager_args)
    eager = {"out": eager_out, **differentiated(eager_args, eager_out, grad_out)}
    out, grads = run_cpu(path, args, grad_out)
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == (args.x.shape, args.x.dtype)
    jumps = args.activation == "relu" and args.matmul_dtype == torch.bfloat16 and not relu_is_safe
    for name, wanted in exact.items():
        found = out if name == "out" else getattr(grads, name)
        argument = args.x if name == "out" else getattr(args, SOURCES[name])
        assert (found.shape, found.dtype) == (argument.shape, argument.dtype), name
        if not wanted.numel() or (jumps and name not in ("out", "w_up", "b_up", "scale")):
            continue
        error, allowed = (
            (value.detach().double() - wanted.detach()).abs().max().item() for value in (found, eager[name])
        )
        floor = FLOOR[args.matmul_dtype] * max(wanted.abs().max().item(), 1.0)
        if name == "scale":  # one number, the sum of as many products as x has elements: eager may be right by luck
            floor *= args.x.numel() ** 0.5
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, eager PyTorch's {allowed:.3g}"


@st.composite
def cpu_calls(draw: st.DrawFn) -> AdapterArguments:
    args = draw(adapter_calls(dtypes=(torch.float32, torch.bfloat16)))
    autocast = draw(st.booleans())
    return args._replace(compute_dtype=torch.bfloat16) if autocast else args


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cpu_calls(), st.sampled_from((64, 400, 2**20)), st.sampled_from((1, 4, 64)))
def test_any_call_is_as_accurate_as_eager(path: str, args: AdapterArguments, tile_bytes: int, short_run: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "TILE_BYTES", tile_bytes)
        patch.setattr(plan, "MINIMUM_ROWS", 1)
        patch.setattr(plan, "SHORT_RUN", short_run)
        assert_as_accurate_as_eager(path, args)


def vit_like(
    tokens: tuple[int, ...] = (4, 50),
    d: int = 192,
    r: int = 16,
    dtype: torch.dtype = torch.float32,
    activation: str = "gelu",
    seed: int = 0,
    num_experts: int = 4,
) -> AdapterArguments:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    return AdapterArguments(
        x=normal(*tokens, d),
        residual=normal(*tokens, d),
        w_down=normal(r, d, gain=d**-0.5),
        b_down=normal(r, gain=0.1),
        w_up=normal(d, r, gain=r**-0.5),
        b_up=normal(num_experts, d, gain=0.1),
        assignment=torch.randint(num_experts, (d, r), generator=generator, dtype=torch.uint8),
        assignment_down=None,
        w_down_init=None,
        expert=None,
        norm_weight=(1 + 0.1 * torch.randn(d, generator=generator)).to(dtype).requires_grad_(),
        norm_bias=normal(d, gain=0.1),
        scale_tensor=None,
        seed=None,
        activity=None,
        expert_id=1,
        scale=0.1,
        activation=activation,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shift", "outlier"), [(0.0, 1.0), (300.0, 1.0), (0.0, 100.0), (-30.0, 100.0)])
def test_large_means_and_outlier_channels(path: str, dtype: torch.dtype, shift: float, outlier: float) -> None:
    args = vit_like(dtype=dtype)
    gain = torch.ones(args.width)
    gain[::61] = outlier
    x = ((args.x.detach().float() * gain) + shift).to(dtype).requires_grad_()
    assert_as_accurate_as_eager(path, args._replace(x=x))


@pytest.mark.parametrize("present", [("residual", "b_up"), ("b_up",), ("residual",), ()], ids="+".join)
def test_what_is_carried_along_is_not_rounded_more_often_than_by_eager(path: str, present: tuple[str, ...]) -> None:
    """In bf16 the error is that of rounding sums as large as x: a branch of a tenth of it is easily lost in more."""
    args = vit_like(dtype=torch.bfloat16)
    args = args._replace(**dict.fromkeys({"residual", "b_up"}.difference(present)))
    exact = oracle_adapter(double(args)).detach()
    error, allowed = (
        (found.detach().double() - exact).square().mean().sqrt().item()
        for found in (PATHS[path].adapter_forward(detached(args))[0], reference.adapter(args))
    )
    assert error <= 1.05 * allowed, f"error {error:.3g}, eager PyTorch's {allowed:.3g}"


def test_long_sums_are_taken_in_parts(path: str) -> None:
    d, r = 16384, 6
    generator = torch.Generator().manual_seed(0)
    x, w_down, w_up = (torch.rand(*shape, generator=generator) for shape in ((5, d), (r, d), (d, r)))
    absent = dict.fromkeys(AdapterArguments._fields[:TENSORS])
    args = AdapterArguments(
        **{**absent, "x": x, "w_down": w_down, "w_up": w_up}, activation="identity", add_input=False
    )
    exact = oracle_adapter(double(args))
    out, _ = run_cpu(path, args, torch.ones_like(x))
    error = ((out - exact) / exact).square().mean().sqrt()
    assert error < 4e-7, "a single chain of additions is further off"


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_gradients_of_many_tokens_are_as_accurate_as_eager(path: str, mean: float) -> None:
    """A bias's is a sum of every token, which eager PyTorch takes in stages."""
    args = vit_like((4, 5000), 32, 8)
    grad_out = torch.randn(args.x.shape, generator=torch.Generator().manual_seed(7)) + mean
    Expected(args, grad_out).check_long_sums(run_cpu(path, args, grad_out)[1])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("where", ["x", "b_down"])
def test_nan_is_not_hidden(path: str, where: str, activation: str) -> None:
    args = call_with_nan(where, activation)
    out, gradients = run_cpu(path, args, torch.ones_like(args.x))
    check_nans(args, out, gradients.x)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_over_their_whole_range(path: str, activation: str, dtype: torch.dtype) -> None:
    args = vit_like(d=64, dtype=dtype, activation=activation)
    wide = (6 * args.w_down.detach()).requires_grad_()
    assert_as_accurate_as_eager(path, args._replace(w_down=wide))


def test_relu_in_half_precision(path: str) -> None:
    args = vit_like(d=32, dtype=torch.bfloat16, activation="relu")._replace(norm_weight=None, norm_bias=None)
    x = torch.randint(-3, 4, args.x.shape).bfloat16().requires_grad_()
    w_down = torch.randint(-1, 2, args.w_down.shape).bfloat16().requires_grad_()
    b_down = torch.full_like(args.b_down, 0.5, requires_grad=True)  # z is half way between integers, never near zero
    assert_as_accurate_as_eager(path, args._replace(x=x, w_down=w_down, b_down=b_down), relu_is_safe=True)


@pytest.mark.parametrize("experts", [[3, 3, 0, 0], [2, 0, 2, 1], [-1, 1, -1, 1], [-1, -1, -1, -1]])
@pytest.mark.parametrize("expert_scale", [1.0, 4.0])
def test_gradients_lie_in_the_active_entries_and_are_not_small(
    path: str, experts: list[int], expert_scale: float
) -> None:
    args = vit_like()._replace(
        expert=torch.tensor(experts), expert_scale=expert_scale, activity=torch.zeros(4), scale=-0.5
    )
    grad_out = torch.randn_like(args.x)
    _, grads = run_cpu(path, args, grad_out)
    exact_args = double(args)
    exact = differentiated(exact_args, oracle_adapter(exact_args), grad_out.double())
    assert args.assignment is not None
    assert grads.w_up is not None
    assert grads.b_up is not None
    assert grads.activity is not None
    for expert in range(4):
        active = expert in experts or MERGED in experts
        entries = grads.w_up[args.assignment == expert]
        wanted = exact["w_up"][args.assignment == expert]
        assert grads.activity[expert] == active
        if active:
            torch.testing.assert_close(entries.norm().double(), wanted.norm(), rtol=1e-4, atol=0)
            torch.testing.assert_close(grads.b_up[expert].norm().double(), exact["b_up"][expert].norm())
            assert (entries != 0).float().mean() > 0.99
        else:
            assert torch.equal(entries.view(torch.int32), torch.zeros_like(entries, dtype=torch.int32))  # +0, not -0
            assert torch.equal(grads.b_up[expert], torch.zeros_like(grads.b_up[expert]))


SPARSE_SHAPES = {  # width, bottleneck, experts, tokens: whole groups and chunks, what is left of them, tokens too few
    "vit": (768, 64, 4, (2, 197)),
    "wide": (130, 256, 8, (3, 45)),
    "odd": (77, 49, 3, (1, 61)),
    "few tokens": (192, 40, 5, (1, 39)),
    "many experts": (64, 32, 32, (4, 43)),
}


@pytest.mark.parametrize("path", ["compiled", "bf16 products"], indirect=True)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SPARSE_SHAPES)
def test_an_expert_of_many(path: str, shape: str, granularity: str) -> None:
    d, r, experts, tokens = SPARSE_SHAPES[shape]
    args = vit_like(tokens, d, r, torch.bfloat16, num_experts=experts)
    generator = torch.Generator().manual_seed(1)
    args = args._replace(assignment=split((d, r), experts, granularity, generator, block_size=4))
    assert_as_accurate_as_eager(path, args._replace(expert=None, expert_id=experts - 1))
    each = torch.arange(tokens[0]) % experts - 1  # a merged sample first
    assert_as_accurate_as_eager(path, args._replace(expert=each, dropout_p=0.3))


@highest_instruction_set("avx512_bf16")
def test_what_an_expert_does_not_own_is_not_multiplied() -> None:
    args = vit_like((1, 50), 96, 64, torch.bfloat16, activation="relu")
    assert args.b_down is not None
    assert args.assignment is not None
    b_down = args.b_down.detach().clone()
    b_down[37] = torch.inf
    out, _, _ = compiled.adapter_forward(detached(args._replace(b_down=b_down, expert=None, expert_id=2)))
    assert torch.equal(out.isfinite().all(dim=(0, 1)), args.assignment[:, 37] != 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bitwise(path: str, dtype: torch.dtype) -> None:
    args = vit_like((8, 197), dtype=dtype)._replace(expert=torch.tensor([1, 0, 2, 3, 1, 1, -1, 0]), dropout_p=0.3)
    grad_out = torch.randn_like(args.x)
    first = run_cpu(path, args, grad_out)
    for _ in range(5):
        again = run_cpu(path, args, grad_out)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True) if a is not None)


def test_strided_inputs(path: str) -> None:
    args = vit_like()
    grad_out = torch.randn_like(args.x)
    expected = run_cpu(path, args, grad_out)

    def strided(tensor: Tensor) -> list[Tensor]:
        """The same values as columns of a wider tensor, with swapped first dimensions, and transposed."""
        wider = torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
        return [wider, tensor.transpose(0, 1).contiguous().transpose(0, 1), tensor.mT.contiguous().mT]

    views = zip(*(strided(t.detach()) for t in (args.x, args.residual, grad_out)), strict=True)
    for x, residual, grad in views:
        out, grads = run_cpu(path, args._replace(x=x, residual=residual), grad)
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(grads, expected[1])
    constant = torch.ones((), dtype=grad_out.dtype).expand(grad_out.shape)  # as sum().backward() gives it
    torch.testing.assert_close(run_cpu(path, args, constant)[1], run_cpu(path, args, constant.contiguous())[1])


@pytest.mark.parametrize("groups", [1, 8])
def test_the_default_device_of_whatever_else_runs_changes_nothing(path: str, groups: int) -> None:
    args = full_call(8, 4, expert=torch.arange(groups) % 3)._replace(dropout_p=0.5, seed_id=3)
    grad_out = torch.randn(args.x.shape)
    expected = run_cpu(path, args, grad_out)
    with torch.device("meta"):
        out, grads = run_cpu(path, args, grad_out)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True) if b is not None)


@pytest.mark.parametrize("shape", [(0, 5), (0,), (1,), (1, 1), ()])
def test_no_tokens_and_one(path: str, shape: tuple[int, ...]) -> None:
    args = vit_like(shape)._replace(activity=torch.zeros(4), scale_tensor=torch.tensor(0.3, requires_grad=True))
    assert_as_accurate_as_eager(path, args)
    out, mean, rstd = PATHS[path].adapter_forward(detached(args))
    assert mean.shape == rstd.shape == (out.numel() // args.width,)


def test_statistics(path: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = detached(vit_like((8, 197), dtype=dtype))
        _, mean, rstd = PATHS[path].adapter_forward(
            args._replace(expert=torch.arange(8 * 197) % 4, x=args.x.view(8 * 197, -1))
        )
        x = args.x.double().view(-1, args.width)
        assert mean.dtype == rstd.dtype == torch.float32
        torch.testing.assert_close(mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
        wanted = (x.var(1, unbiased=False) + args.norm_eps).rsqrt()
        torch.testing.assert_close(rstd.double(), wanted, rtol=1e-5, atol=1e-6)
        _, mean, rstd = PATHS[path].adapter_forward(args._replace(norm_weight=None, norm_bias=None))
        assert mean.shape == rstd.shape == (0,)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cpu_calls())
def test_inputs_are_left_alone(path: str, args: AdapterArguments) -> None:
    before = [value.detach().clone() if isinstance(value, Tensor) else value for value in args]
    grad_out = torch.randn(args.x.shape).to(args.x.dtype)
    kept = grad_out.clone()
    run_cpu(path, args, grad_out)
    assert torch.equal(grad_out, kept)
    for value, old in zip(args, before, strict=True):
        assert torch.equal(value, old) if isinstance(value, Tensor) else value == old


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cpu_calls())
def test_no_uninitialised_element_is_read_or_left(path: str, args: AdapterArguments) -> None:
    grad_out = torch.ones_like(args.x)
    args = args._replace(scale_tensor=torch.tensor(0.5))
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        out, grads = run_cpu(path, args, grad_out)
    assert not out.isnan().any()
    assert not any(grad.isnan().any() for grad in grads if grad is not None)


@pytest.mark.parametrize("wanted", [*AdapterNeeds._fields, ""])
@pytest.mark.parametrize("norm", [True, False])
def test_only_the_gradients_asked_for(path: str, wanted: str, norm: bool) -> None:
    args = vit_like()._replace(activity=torch.zeros(4), scale_tensor=torch.tensor(0.3, requires_grad=True))
    if not norm:
        args = args._replace(norm_weight=None, norm_bias=None)
    grad_out = torch.randn_like(args.x)
    _, everything = run_cpu(path, args, grad_out)
    _, grads = run_cpu(path, args, grad_out, AdapterNeeds(*(name == wanted for name in AdapterNeeds._fields)))
    for name, grad, full in zip(AdapterNeeds._fields, grads, everything, strict=True):
        assert (grad is None) == (name != wanted or full is None)
        if grad is not None:
            torch.testing.assert_close(grad, full)


@pytest.mark.parametrize("norm", [True, False])
def test_samples_of_one_expert_that_lie_apart(path: str, norm: bool) -> None:
    """Short runs are gathered by expert, with their dropout and what the norm keeps of each token."""
    args = vit_like((4, 6), 24, 5)._replace(expert=torch.tensor([1, 0, 1, 0]), expert_id=MERGED)
    args = args._replace(dropout_p=0.3, seed=torch.tensor([1, 2, 3, 4]))
    if not norm:
        args = args._replace(norm_weight=None, norm_bias=None)
    assert plan.make_plan(args, 24).order is not None
    assert_as_accurate_as_eager(path, args)


def test_declines_with_a_reason() -> None:
    args = vit_like()
    assert cpu.available() == (True, "")
    assert cpu.supports_adapter(args) == (True, "")
    ok, reason = cpu.supports_adapter(args._replace(x=args.x.double()))
    assert not ok
    assert "float64" in reason
    ok, reason = cpu.supports_adapter(args._replace(x=args.x.to("meta")))
    assert not ok
    assert "meta" in reason
    ok, reason = cpu.supports_adapter(args._replace(compute_dtype=torch.float16))
    assert not ok
    assert "float16" in reason


@pytest.mark.parametrize("path", ["compiled", "bf16 products"], indirect=True)
def test_threads_share_the_work_and_change_no_bit_up_to_eight(path: str) -> None:
    args = vit_like((24, 197), 64, 32, torch.bfloat16)._replace(expert=torch.arange(24) % 4, expert_id=MERGED)
    grad_out = torch.randn_like(args.x)
    before = torch.get_num_threads()
    found = {}
    try:
        for threads in (1, 3, 8, 20):
            torch.set_num_threads(threads)
            out, grads = run_cpu(path, args, grad_out)
            found[threads] = [out, *(value for value in grads if isinstance(value, Tensor))]
    finally:
        torch.set_num_threads(before)
    for threads in (3, 8):
        assert all(map(torch.equal, found[threads], found[1]))
    for many, few in zip(found[20], found[1], strict=True):
        torch.testing.assert_close(many, few, rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.skipif(bool(extension().reason), reason=extension().reason or "")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_threads_of_its_parent() -> None:
    """An OpenMP runtime waits for ever for its threads, which fork leaves behind; plain threads are started anew."""
    generator = torch.Generator().manual_seed(0)
    x, w_down, w_up = (torch.randn(size, generator=generator) for size in ((4, 197, 192), (64, 192), (192, 64)))

    def result() -> Tensor:
        return mosa_adapter(x, w_down, None, w_up, None, None, None, backend="cpu")

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = result()
        shared = torch.zeros_like(expected).share_memory_()
        child = os.fork()
        if child == 0:
            try:
                np.copyto(shared.numpy(), result().numpy())  # PyTorch's own copy might use the runtime
            finally:
                os._exit(0)
        deadline = time.monotonic() + 60
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail("the forked process hangs")
            time.sleep(0.01)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(shared, expected)
