"""The operator's contract: schema, fake kernels, autograd, autocast, torch.compile, FLOPs and error messages."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from calls import full_call
from cases import adapter_calls
from hypothesis import assume, given, settings
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import mosa_kernels as mk
from mosa_kernels._extension import extension
from mosa_kernels.backends import adapter_kernels
from mosa_kernels.backends.arguments import AdapterArguments, AdapterNeeds
from mosa_kernels.backends.choice import choose_adapter_backend
from mosa_kernels.functional import adapter, checks
from mosa_kernels.functional.adapter import AdapterFunction, mosa_adapter

D, R, N = 24, 6, 3
MULTIPLIES_BF16 = (
    not extension().reason and extension().module.adapter_cpu_fastest_instruction_set(True) == "avx512_bf16"
)
"""Else the C++ kernels multiply in float32: the CPU cannot, or is faster so."""


def _weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"w_down": (R, D), "b_down": (R,), "w_up": (D, R), "b_up": (N, D), "norm_weight": (D,), "norm_bias": (D,)}
    return {name: (torch.randn(shape, dtype=dtype) / 4).requires_grad_() for name, shape in shapes.items()}


def _assignment() -> Tensor:
    return mk.split((D, R), N, generator=torch.Generator().manual_seed(1))


@settings(max_examples=20)
@given(adapter_calls(max_width=24, max_bottleneck=8, max_tokens=12))
def test_opcheck(args: AdapterArguments) -> None:
    assume(choose_adapter_backend(args) == "cpu")
    torch.library.opcheck(torch.ops.mosa_kernels.adapter_forward.default, (*args, "cpu"))


@settings(max_examples=10)
@given(adapter_calls(max_width=24, max_bottleneck=8, max_tokens=12))
def test_opcheck_backward(args: AdapterArguments) -> None:
    assume(choose_adapter_backend(args) == "cpu")
    args = AdapterArguments(*(value.detach() if isinstance(value, Tensor) else value for value in args))
    out, mean, rstd = torch.ops.mosa_kernels.adapter_forward.default(*args, "cpu")
    tensors = [args.x, args.w_down, args.b_down, args.w_up, args.b_up, args.norm_weight, args.norm_bias]
    needs = list(AdapterNeeds(*(tensor is not None for tensor in (*tensors, args.scale_tensor, args.activity))))
    torch.library.opcheck(
        torch.ops.mosa_kernels.adapter_backward.default, (torch.randn_like(out), mean, rstd, needs, *args, "cpu")
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_graph_serves_every_expert(backend: str) -> None:
    w, assignment = _weights(), _assignment()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor, expert: Tensor, seed: Tensor) -> Tensor:
        return mk.mosa_adapter(
            x, assignment=assignment, expert=expert, dropout_p=0.3, seed=seed, residual=2 * x, backend=backend, **w
        )

    x = torch.randn(2, 5, D, requires_grad=True)
    leaves = [x, *w.values()]
    for number in (*range(N), -1):
        expert, seed = torch.tensor(number), torch.tensor(number + 17)
        out = step(x, expert, seed)
        eager = mk.mosa_adapter(
            x, assignment=assignment, expert=expert, dropout_p=0.3, seed=seed, residual=2 * x, backend=backend, **w
        )
        torch.testing.assert_close(out, eager)
        weight = torch.randn_like(out)
        for found, wanted in zip(
            torch.autograd.grad(out, leaves, weight), torch.autograd.grad(eager, leaves, weight), strict=True
        ):
            torch.testing.assert_close(found, wanted)
    assert counter.frame_count == 1


def test_one_graph_serves_every_token_count() -> None:
    w, assignment = _weights(), _assignment()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda x, e: mk.mosa_adapter(x, assignment=assignment, expert=e, **w),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    compilations = []
    for batch, length in ((2, 5), (3, 7), (4, 11)):
        x, expert = torch.randn(batch, length, D), torch.randint(N, (batch,))
        torch.testing.assert_close(step(x, expert), mk.mosa_adapter(x, assignment=assignment, expert=expert, **w))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1  # nothing was compiled after the first call


def test_inductor_gives_the_same_gradients() -> None:
    w, assignment = _weights(), _assignment()
    x, expert = torch.randn(2, 5, D, requires_grad=True), torch.tensor([0, 2])

    def step(x: Tensor) -> Tensor:
        return mk.mosa_adapter(torch.sin(x), assignment=assignment, expert=expert, **w).square().mean()

    leaves = [x, *w.values()]
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(x), leaves)
    for grad, wanted in zip(found, torch.autograd.grad(step(x), leaves), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_stream_and_chooses_the_product_dtype(backend: str, dtype: torch.dtype) -> None:
    w, assignment = _weights(), _assignment()
    x = torch.randn(2, 5, D, dtype=dtype, requires_grad=True)
    residual = torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = mk.mosa_adapter(x, assignment=assignment, expert=1, residual=residual, backend=backend, **w)
    assert out.dtype == torch.float32  # as x + residual
    full = mk.mosa_adapter(x.float(), assignment=assignment, expert=1, residual=residual, backend="reference", **w)
    assert (out - full).abs().max() < 0.05  # products were rounded to bf16, and no more than that
    if backend == "reference" or MULTIPLIES_BF16:
        assert (out - full).abs().max() > 1e-5
    grads = torch.autograd.grad(out.sum(), [x, *w.values()])
    assert [grad.dtype for grad in grads] == [dtype] + [torch.float32] * len(w)


def test_autocast_of_the_operator_itself() -> None:
    w, assignment = _weights(), _assignment()
    args = AdapterArguments(
        torch.randn(2, 5, D),
        None,
        *(w[name] for name in ("w_down", "b_down", "w_up", "b_up")),
        assignment,
        *(None,) * 8,
        expert_id=2,
    )
    with torch.autocast("cpu", torch.bfloat16):
        implicit = torch.ops.mosa_kernels.adapter_forward(*args, "cpu")[0]
    explicit = torch.ops.mosa_kernels.adapter_forward(*args._replace(compute_dtype=torch.bfloat16), "cpu")[0]
    assert torch.equal(implicit, explicit)
    if MULTIPLIES_BF16:
        assert not torch.equal(implicit, torch.ops.mosa_kernels.adapter_forward(*args, "cpu")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_float64_alone(dtype: torch.dtype) -> None:
    w, assignment = _weights(), _assignment()
    w = {name: tensor.detach().double().requires_grad_() for name, tensor in w.items()}
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 5, D)

    def call(residual: Tensor) -> tuple[Tensor, ...]:
        out = mk.mosa_adapter(x, assignment=assignment, expert=1, residual=residual, **w)
        return (out, *torch.autograd.grad(out.square().sum(), [x, *w.values()]))

    wanted = call(residual.double())
    with torch.autocast("cpu", dtype):
        found = call(residual)
        compiled = torch.compile(lambda x: mk.mosa_adapter(x, assignment=assignment, expert=1, **w), backend="eager")(x)
    for ours, exact in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compiled + residual, wanted[0], rtol=1e-12, atol=1e-12)


def test_dispatcher_and_direct_calls_agree() -> None:
    w, assignment = _weights(), _assignment()
    x = torch.randn(2, 5, D, requires_grad=True)
    args = AdapterArguments(
        x,
        x,
        *(w[name] for name in ("w_down", "b_down", "w_up", "b_up")),
        *(assignment, None, None, torch.tensor([1, -1]), w["norm_weight"], w["norm_bias"], None, None, None),
    )
    leaves = [x, *w.values()]
    direct = AdapterFunction.apply(*args, "cpu")[0]
    dispatched = torch.ops.mosa_kernels.adapter_forward(*args, "cpu")[0]
    assert torch.equal(direct, dispatched)
    weight = torch.randn_like(direct)
    for found, wanted in zip(
        torch.autograd.grad(direct, leaves, weight), torch.autograd.grad(dispatched, leaves, weight), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["w_down", "w_up", "assignment", "expert", "seed"])
def test_a_tensor_subclass_is_computed_by_its_own_rules(name: str) -> None:
    """A `TwoTensor` holds two tensors and computes with both; its own memory, which a kernel would read, is neither."""
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        **{key: value.detach() for key, value in _weights().items()},
        "x": torch.randn(2, 5, D, generator=generator),
        "assignment": _assignment(),
        "expert": torch.tensor([1, -1]),
        "seed": torch.tensor(3),
    }
    other = torch.flip(arguments[name], (0,)) if arguments[name].dim() else arguments[name] + 1
    wanted = [mosa_adapter(**{**arguments, name: one}, dropout_p=0.2) for one in (arguments[name], other)]
    found = mosa_adapter(**{**arguments, name: TwoTensor(arguments[name], other)}, dropout_p=0.2)
    assert isinstance(found, TwoTensor)
    torch.testing.assert_close([found.a, found.b], wanted)
    assert not torch.equal(found.a, found.b)


def test_kernels_decline_a_tensor_subclass() -> None:
    args = full_call()
    assert adapter_kernels.takes(args)[0]
    ok, reason = adapter_kernels.takes(args._replace(w_up=TwoTensor(args.w_up.detach(), args.w_up.detach())))
    assert not ok
    assert reason == "w_up is a TwoTensor, not a plain tensor"


def test_flops_are_counted_by_formula() -> None:
    w, assignment = _weights(), _assignment()
    x = torch.randn(2, 5, D, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = mk.mosa_adapter(x, assignment=assignment, expert=1, backend="cpu", **w)
    assert counter.get_total_flops() == 4 * 10 * D * R
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 10 * D * R


@pytest.mark.parametrize(
    ("trained", "products"), [("b_up", 2), ("w_up", 3), ("w_down", 3), ("norm_weight", 3), ("w_down norm_weight", 3)]
)
def test_flops_of_what_one_gradient_needs(trained: str, products: int) -> None:
    w = {name: tensor.detach() for name, tensor in _weights().items()}
    for name in trained.split():
        w[name].requires_grad_()
    out = mk.mosa_adapter(torch.randn(2, 5, D), assignment=_assignment(), expert=1, backend="cpu", **w)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == products * 2 * 10 * D * R


def test_a_graph_of_the_gradient_of_the_residual_alone() -> None:
    w = {name: tensor.detach() for name, tensor in _weights().items()}
    residual = torch.randn(2, 5, D, requires_grad=True)
    out = mk.mosa_adapter(torch.randn(2, 5, D), assignment=_assignment(), expert=1, residual=residual, **w)
    (grad,) = torch.autograd.grad(out, residual, 2 * torch.ones_like(out), create_graph=True)
    assert torch.equal(grad, torch.full_like(out, 2))


@pytest.mark.parametrize("expert", [1, -1, torch.tensor([2, 0])], ids=str)
def test_second_derivatives_are_those_of_the_definition(expert: int | Tensor) -> None:
    w, assignment = _weights(), _assignment()
    start = torch.randn(2, 5, D, requires_grad=True)
    probes = [torch.randn_like(tensor) for tensor in (start, *w.values())]

    def second(backend: str) -> tuple[Tensor, ...]:
        x = start * start  # a way to the input besides the adapter's own graph
        out = mk.mosa_adapter(
            x, assignment=assignment, expert=expert, residual=2 * start, dropout_p=0.3, seed=5, backend=backend, **w
        )
        inputs = (start, *w.values())
        first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        product = sum((grad * probe).sum() for grad, probe in zip(first, probes, strict=True))
        return *first, *torch.autograd.grad(product, inputs)

    for found, wanted in zip(second("cpu"), second("reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_transforms_of_torch_func_run_the_definition() -> None:
    w = {name: value.detach() for name, value in _weights().items()}
    x, assignment = torch.randn(3, 5, D), _assignment()

    def loss(w_up: Tensor, tokens: Tensor, backend: str | None = None) -> Tensor:
        return mk.mosa_adapter(tokens, assignment=assignment, expert=1, backend=backend, **{**w, "w_up": w_up}).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(w["w_up"], x)
    for gradient, tokens in zip(per_sample, x, strict=True):
        leaf = w["w_up"].clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, tokens), leaf)[0])
    with pytest.raises(ValueError, match="backend: expected None or 'reference' within transforms"):
        torch.func.grad(loss)(w["w_up"], x[0], "cpu")


@pytest.mark.parametrize("reports", [False, True])
def test_forward_mode_runs_the_definition(reports: bool) -> None:
    """Also of a layer in training, whose optimizer asks which experts ran."""
    w = {name: value.detach() for name, value in _weights().items()}
    x, direction, assignment = torch.randn(3, 5, D), torch.randn(3, 5, D), _assignment()
    activity = torch.zeros(N, requires_grad=True) if reports else None

    def adapted(tokens: Tensor, backend: str | None = None) -> Tensor:
        return mk.mosa_adapter(tokens, assignment=assignment, expert=1, activity=activity, backend=backend, **w)

    exact = {name: value.double() for name, value in w.items()}
    leaf = x.double().requires_grad_()
    exact_out = mk.mosa_adapter(leaf, assignment=assignment, expert=1, **exact)
    weight = torch.ones_like(exact_out).requires_grad_()  # twice reverse is forward
    (pulled,) = torch.autograd.grad(exact_out, leaf, weight, create_graph=True)
    (expected,) = torch.autograd.grad(pulled, weight, direction.double())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(adapted(forward_ad.make_dual(x, direction))).tangent
        torch.testing.assert_close(adapted(x, "cpu"), adapted(x))  # nothing of it is differentiated
        with pytest.raises(ValueError, match=r"backend: expected None or 'reference' .* forward-mode"):
            adapted(forward_ad.make_dual(x, direction), "cpu")
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.jvp(adapted, (x,), (direction,))[1], tangent)


def test_many_gradients_of_one_output_at_once() -> None:
    """As `is_grads_batched` and a vectorised Jacobian ask for them."""
    w, x, assignment = _weights(), torch.randn(3, 5, D, requires_grad=True), _assignment()
    activity = torch.zeros(N, requires_grad=True)
    out = mk.mosa_adapter(x, assignment=assignment, expert=1, residual=x, activity=activity, backend="cpu", **w)
    grads, leaves = torch.randn(4, *out.shape), [x, *w.values()]
    together = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    assert not any(found.requires_grad for found in together)
    for number, grad in enumerate(grads):
        alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        torch.testing.assert_close([found[number] for found in together], list(alone), rtol=1e-4, atol=1e-4)
    assert not together[3][:, assignment != 1].any()  # of w_up


def test_vmap_takes_experts_along() -> None:
    """One for each sample, or drawn for it; their values are nowhere to be looked at."""
    w = {name: value.detach() for name, value in _weights().items()}
    x, expert, assignment = torch.randn(4, 5, D), torch.tensor([0, 1, 2, -1]), _assignment()

    def adapted(tokens: Tensor, expert: Tensor) -> Tensor:
        return mk.mosa_adapter(tokens, assignment=assignment, expert=expert, **w)

    found = torch.func.vmap(adapted)(x, expert)
    for out, tokens, each in zip(found, x, expert, strict=True):
        torch.testing.assert_close(out, adapted(tokens, each))
    drawn = torch.func.vmap(lambda tokens: adapted(tokens, torch.randint(N, ())), randomness="different")(x)
    assert drawn.shape == x.shape


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_trace_holds_the_computation_not_its_result(backend: str | None) -> None:
    w, assignment = {name: value.detach() for name, value in _weights().items()}, _assignment()

    def adapted(x: Tensor) -> Tensor:
        return mk.mosa_adapter(x, assignment=assignment, expert=1, backend=backend, **w)

    first, second = torch.randn(4, 7, D), torch.randn(4, 7, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks that become constants, and of torch.jit itself
        traced = torch.jit.trace(adapted, first)
    torch.testing.assert_close(traced(second), adapted(second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_activity_is_reported_through_its_gradient(backend: str) -> None:
    w, assignment = _weights(), _assignment()
    activity = torch.zeros(N, requires_grad=True)
    x = torch.randn(4, 5, D)

    def run(expert: Tensor | int | None) -> Tensor:
        return mk.mosa_adapter(x, assignment=assignment, expert=expert, activity=activity, backend=backend, **w).sum()

    for expert, wanted in (
        (1, [0, 1, 0]),
        (torch.tensor(2), [0, 0, 1]),
        (torch.tensor([0, 2]), [1, 0, 1]),
        (torch.tensor([0, -1]), [1, 1, 1]),
        (None, [1, 1, 1]),
    ):
        (grad,) = torch.autograd.grad(run(expert), activity)
        assert (grad != 0).tolist() == [bool(ran) for ran in wanted]
    run(0)  # a forward pass without a backward pass reports nothing
    (run(1) + run(2)).backward()
    assert activity.grad is not None
    assert (activity.grad != 0).tolist() == [False, True, True]


def _bad(**changed: object) -> dict[str, object]:
    return {"x": torch.randn(2, 5, D), "assignment": _assignment(), "expert": 0, **_weights(), **changed}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"x": torch.ones(2, 5, D, dtype=torch.int64)},
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape"),
        ({"x": torch.randn(2, 5, D + 1)}, ValueError, r"w_down: expected shape \[r, 25\].*got \[6, 24\]"),
        ({"w_down": torch.randn(D)}, ValueError, r"w_down: expected shape .*got \[24\]"),
        ({"b_down": torch.randn(R + 1)}, ValueError, r"b_down: expected shape \[6\], got \[7\]"),
        ({"w_up": torch.randn(R, D)}, ValueError, r"w_up: expected shape \[24, 6\], got \[6, 24\]"),
        ({"b_up": torch.randn(N, R)}, ValueError, r"b_up: expected shape \[24\] or \[N, 24\], got \[3, 6\]"),
        ({"norm_weight": torch.randn(R)}, ValueError, r"norm_weight: expected shape \[24\], got \[6\]"),
        ({"norm_weight": None}, ValueError, "norm_bias: expected None without norm_weight"),
        ({"assignment": _assignment().long()}, TypeError, "assignment: expected torch.uint8, got torch.int64"),
        ({"assignment": _assignment().t()}, ValueError, r"assignment: expected shape \[24, 6\], got \[6, 24\]"),
        ({"assignment_down": _assignment().t()}, ValueError, "w_down_init: expected together with assignment_down"),
        (
            {"residual": torch.randn(5, D)},
            ValueError,
            r"residual: expected the shape of x, \[2, 5, 24\], got \[5, 24\]",
        ),
        (
            {"residual": torch.randn(2, 5, D).half()},
            TypeError,
            "residual: expected the dtype of x, .*got torch.float16",
        ),
        ({"w_up": torch.randn(D, R).half()}, TypeError, "w_up: expected torch.float32 .*got torch.float16"),
        ({"w_up": torch.randn(D, R, device="meta")}, ValueError, "w_up: expected on cpu .*got meta"),
        ({"residual": torch.randn(2, 5, D, device="meta")}, ValueError, "residual: expected on cpu .*got meta"),
        ({"activity": torch.zeros(N, device="meta")}, ValueError, "activity: expected on cpu .*got meta"),
        ({"assignment": _assignment().to("meta")}, ValueError, "assignment: expected on cpu .*got meta"),
        ({"scale": torch.ones(1)}, ValueError, r"scale: expected a number or a tensor of shape \[\], got \[1\]"),
        ({"expert": N}, ValueError, r"expert: expected 0 to 2, or -1 for the merged adapter, got \[3\]"),
        ({"expert": -2}, ValueError, r"expert: expected 0 to 2.*got \[-2\]"),
        ({"expert": torch.tensor([0, 3])}, ValueError, r"expert: expected 0 to 2.*got \[0, 3\]"),
        ({"expert": torch.tensor([0, 1, 2])}, ValueError, r"expert: expected shape \[\] or \[G\].*got \[3\]"),
        ({"expert": torch.tensor(1.0)}, TypeError, "expert: expected an integer tensor, got torch.float32"),
        ({"expert": [0, 1]}, TypeError, "expert: expected None, an integer or an integer tensor, got list"),
        ({"expert": 1.0}, TypeError, "expert: expected None, an integer or an integer tensor, got float"),
        ({"seed": 2**63, "dropout_p": 0.5}, ValueError, "seed: expected a signed number of 64 bits, got 9223372"),
        ({"scale": None}, TypeError, "scale: expected a number, got NoneType"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p: expected a number, got str"),
        ({"activity": torch.zeros(N).double()}, TypeError, "activity: expected torch.float32, got torch.float64"),
        ({"activity": torch.zeros(N + 1)}, ValueError, r"activity: expected shape \[3\].*got \[4\]"),
        ({"activation": "swish"}, ValueError, "activation: expected one of gelu, .*got 'swish'"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: expected 0 <= p < 1, got 1.0"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected at least 0, got -1.0"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected at least 0, got nan"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": [1.0], "dropout_p": 0.5}, TypeError, "x: expected a tensor, got list"),
        ({"w_up": None}, TypeError, "w_up: expected a tensor, got NoneType"),
        ({"b_down": "zeros"}, TypeError, "b_down: expected a tensor, got str"),
        ({"assignment": 3}, TypeError, "assignment: expected a tensor, got int"),
        ({"residual": 0}, TypeError, "residual: expected a tensor, got int"),
        ({"expert": True}, TypeError, "expert: expected None, an integer or an integer tensor, got bool"),
        ({"add_input": "no"}, TypeError, "add_input: expected True or False, got 'no'"),
        ({"backend": "tpu"}, ValueError, "backend: expected one of .*got 'tpu'"),
        ({"x": torch.randn(2, D).double(), "backend": "cpu"}, (TypeError, ValueError), "float64|torch.double|w_down"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.mosa_adapter(**_bad(**changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_residual_is_not_kept(backend: str) -> None:
    w, x, residual = _weights(), torch.randn(4, 7, D, requires_grad=True), torch.randn(4, 7, D, requires_grad=True)
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mk.mosa_adapter(x, assignment=_assignment(), expert=1, residual=residual, backend=backend, **w)
    assert x.untyped_storage().data_ptr() in kept
    assert residual.untyped_storage().data_ptr() not in kept
    grad_out = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, residual, grad_out)[0], grad_out)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("wide", "narrow"), [("x", "residual"), ("residual", "x")])
def test_autocast_widens_the_narrower_of_x_and_residual(
    backend: str, wide: str, narrow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FFN's output is bf16 under autocast, the residual stream float32: no copy of the former is made for that."""
    w, assignment, seen = _weights(), _assignment(), []
    monkeypatch.setattr(adapter, "check_adapter", lambda args: seen.append(args) or checks.check_adapter(args))
    tokens = {wide: torch.randn(4, 7, D), narrow: torch.randn(4, 7, D).bfloat16()}
    leaves = {name: value.requires_grad_() for name, value in tokens.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = mk.mosa_adapter(assignment=assignment, expert=1, backend=backend, **leaves, **w)
    assert out.dtype == torch.float32
    assert seen[0].residual.dtype == tokens["residual"].dtype
    grad_out = torch.randn_like(out)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out)
    same = {name: value.detach().float().requires_grad_() for name, value in tokens.items()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = mk.mosa_adapter(assignment=assignment, expert=1, backend=backend, **same, **w)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected, list(same.values()), grad_out)
    for name, grad, other in zip(leaves, found, wanted, strict=True):
        assert grad.dtype == tokens[name].dtype
        torch.testing.assert_close(grad, other.to(grad.dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_views_with_a_sign_pending_and_zeros_without_memory(backend: str) -> None:
    x, grad_out = torch.randn(2, 5, D), torch.randn(2, 5, D)
    options = {"assignment": _assignment(), "expert": 1, "backend": backend}
    w = _weights()

    def gradients(x: Tensor, residual: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
        out = mk.mosa_adapter(x, residual=residual, **options, **w)
        return out, *torch.autograd.grad(out, list(w.values()), grad_out)

    found = gradients(torch._neg_view(-x), torch._neg_view(-x), torch._neg_view(-grad_out))
    for one, other in zip(gradients(x, x, grad_out), found, strict=True):
        assert torch.equal(one, other)
    for gradient in gradients(x, x, torch._efficientzerotensor((2, 5, D)))[1:]:
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ids_written_over_before_the_backward_pass_are_an_error(backend: str) -> None:
    """Or the report would name another expert than the one that the gradient is of."""
    expert, activity = torch.tensor(0), torch.zeros(N, requires_grad=True)
    out = mk.mosa_adapter(
        torch.randn(2, 5, D), assignment=_assignment(), expert=expert, activity=activity, backend=backend, **_weights()
    )
    expert.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_frozen_values_take_no_gradient() -> None:
    down = {"assignment_down": _assignment().T.contiguous(), "w_down_init": torch.randn(R, D, requires_grad=True)}
    for backend in ("cpu", "reference"):
        out = mk.mosa_adapter(
            torch.randn(2, 5, D), assignment=_assignment(), expert=1, backend=backend, **_weights(), **down
        )
        out.sum().backward()
        assert down["w_down_init"].grad is None


def test_integers_of_numpy_are_numbers() -> None:
    x, w = torch.randn(2, 5, D), _weights()
    for backend in ("cpu", "reference"):
        options = {"assignment": _assignment(), "dropout_p": 0.5, "backend": backend, **w}
        wanted = mk.mosa_adapter(x, expert=1, seed=3, **options)
        assert torch.equal(mk.mosa_adapter(x, expert=np.int64(1), seed=np.int32(3), **options), wanted)
    with pytest.raises(TypeError, match="expert: expected None, an integer or an integer tensor, got ndarray"):
        mk.mosa_adapter(x, expert=np.array([0, 1]), **options)
    with pytest.raises(TypeError, match=r"expert: expected an integer tensor, got torch\.uint16"):
        mk.mosa_adapter(x, expert=torch.tensor([0, 1], dtype=torch.uint16), **options)


def test_no_columns_at_all() -> None:
    """Nothing comes of nothing, whatever the backend that is asked first."""
    empty = {"w_down": torch.zeros(R, 0), "b_down": torch.zeros(R), "w_up": torch.zeros(0, R)}
    assert mk.mosa_adapter(torch.zeros(2, 5, 0), b_up=None, **empty).shape == (2, 5, 0)


def test_nothing_of_the_caller_is_changed() -> None:
    w, assignment = _weights(), _assignment()
    x, residual = torch.randn(4, 5, D, requires_grad=True), torch.randn(4, 5, D, requires_grad=True)
    before = [tensor.detach().clone() for tensor in (x, residual, *w.values())]
    out = mk.mosa_adapter(x, assignment=assignment, expert=torch.tensor([0, 2]), residual=residual, **w)
    grad = torch.randn_like(out)
    kept = grad.clone()
    out.backward(grad)
    assert torch.equal(grad, kept)
    for tensor, value in zip((x, residual, *w.values()), before, strict=True):
        assert torch.equal(tensor, value)


def test_meta_tensors_have_shapes_alone() -> None:
    """As tools that plan memory or count parameters run a model."""
    layer = mk.FusedMoSAAdapter(24, 8, device="meta")
    x = torch.empty(2, 5, 24, device="meta", requires_grad=True)
    for module in (layer.train(), layer.eval()):
        out = module(x, torch.empty_like(x))
        assert (out.shape, out.device.type) == (x.shape, "meta")
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
