"""The adapter's cases: what they expect is what the oracle says, and every provider computes it."""

from __future__ import annotations

import pytest
import torch
from oracle import double, oracle_adapter

from mosa_kernels.backends.arguments import MERGED, AdapterArguments
from mosa_kernels.bench.adapter import EPS, SCALE, Adapter
from mosa_kernels.bench.adapter_work import FLOOR, adapter_work, training_state
from mosa_kernels.bench.shapes import Point

CPU = torch.device("cpu")
POINTS = [
    Point("swin_b_4", 4, 8, 3, "fp32", "sample"),
    Point("swin_b_4", 2, 24, 4, "bf16", "call"),
    Point("swin_b_4", 2, 8, 1, "fp32", "call"),
    Point("swin_b_4", 2, 8, 2, "fp32", "call", layers=3),
]


def oracle(adapter: Adapter, merged: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients of one layer by the oracle of the tests."""
    (layer,) = adapter.drawn.layers
    args = double(
        AdapterArguments(
            *adapter.drawn[:2], *layer[:4], layer.assignment, None, None, None if merged else layer.expert,
            layer.gamma, layer.beta, None, None, None,
            expert_id=MERGED, norm_eps=EPS, scale=SCALE, merged_scale=1 / layer.b_up.shape[0],
        )
    )  # fmt: skip
    out = oracle_adapter(args)
    names = {"gamma": args.norm_weight, "beta": args.norm_bias}
    names |= {name: getattr(args, name) for name in ("x", "residual", "w_down", "b_down", "w_up", "b_up")}
    gradients = torch.autograd.grad(out, list(names.values()), adapter.drawn.grad_out.double())
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.mark.parametrize("point", [point for point in POINTS if point.layers == 1], ids=str)
def test_expected_is_what_the_oracle_says(point: Point) -> None:
    adapter = Adapter(point, CPU)
    expected = adapter.expected("expert", "both").exact
    found = oracle(adapter)
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(expected[name], tensor, rtol=1e-10, atol=1e-10, msg=name)
    merged = adapter.expected("merged", "forward").exact["out"]
    torch.testing.assert_close(merged, oracle(adapter, merged=True)["out"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_every_available_provider_passes_the_gate(point: Point, direction: str) -> None:
    case = Adapter(point, CPU).case(direction)
    passed = set()
    for provider in case.providers():
        if provider.reason is None:
            prepared = provider.prepare()
            results = prepared.results()
            verdict = case.expected(prepared.function).check(results)
            assert verdict.green, (provider.name, verdict)
            assert ("x" in results) == (direction != "forward")
            prepared.run()
            prepared.run()  # a backward pass runs twice over one graph
            passed.add(provider.name)
    assert {"eager", "cpu"} <= passed
    assert ("N copies" in passed) == (point.expert_per == "call")
    assert ("merged dense" in passed) == (direction == "forward")


def test_idle_experts_have_no_gradient_and_that_is_checked() -> None:
    adapter = Adapter(Point("swin_b_4", 2, 8, 4, expert_per="call"), CPU)
    (layer,) = adapter.drawn.layers
    expected = adapter.expected("expert", "both")
    assert expected.idle["w_up"].float().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(expected.idle["w_up"], layer.assignment != int(layer.expert))
    assert not expected.exact["w_up"][expected.idle["w_up"]].any()
    leak = {**expected.eager, "w_up": expected.eager["w_up"] + 1e-12 * expected.idle["w_up"]}
    assert "exactly zero" in str(expected.check(leak).reason)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_what_the_adapter_adds_is_held_to_account(dtype: str) -> None:
    """It is a small part of the output, and drowns in the rounding of the rest if only the output is looked at."""
    adapter = Adapter(Point("vit_ti", 4, 16, 4, dtype, "call"), CPU)
    expected = adapter.expected("expert", "both")
    carried = {"out": (adapter.drawn.x + adapter.drawn.residual).detach(), "x": adapter.drawn.grad_out}
    for name, rest in carried.items():
        added = expected.exact[name] - rest.double()
        for share, green in ((1.0, True), (0.95, False), (0.85, False)):
            found = (rest.double() + share * added).to(rest.dtype)
            verdict = expected.check({**expected.eager, name: found})
            assert verdict.green is green, (share, verdict)
        for wrong in (slice(-1, None), (slice(None), slice(None), slice(-8, None))):  # an image, the last channels
            part = added.clone()
            part[wrong] = 0
            verdict = expected.check({**expected.eager, name: (rest.double() + part).to(rest.dtype)})
            assert not verdict.green
        lost = expected.eager[name].clone()
        lost[-1, -1, -16:] = 0
        assert not expected.check({**expected.eager, name: lost}).green


def test_a_gradient_that_is_not_there_is_red() -> None:
    expected = Adapter(POINTS[0], CPU).expected("expert", "both")
    found = {name: tensor for name, tensor in expected.eager.items() if name != "w_up"}
    assert expected.check(found).reason == "w_up: there is none"


def test_bytes_of_vit_b_are_those_counted_by_hand() -> None:
    point = Point("vit_b", 128, 64, 4, "bf16")
    activations, bottleneck = 128 * 197 * 768 * 2, 128 * 197 * 64 * 2
    weights = 2 * 768 * 64 * 2 + 768 * 64
    for provider, direction, of_x, of_bottleneck in (
        (FLOOR, "forward", 3, 0),
        ("eager", "forward", 12, 4),
        ("compile", "forward", 8, 4),
        ("compile max-autotune", "forward", 6, 3),
        ("triton", "backward", 5, 4),
        ("eager", "backward", 15, 8),
    ):
        work = adapter_work(provider, direction, point)
        assert work is not None
        extra = work.bytes - of_x * activations - of_bottleneck * bottleneck
        assert extra == weights + (2 * 768 * 64 * 2 if direction == "backward" else 0)
    both, forward = adapter_work("triton", "both", point), adapter_work("triton", "forward", point)
    assert both is not None
    assert forward is not None
    assert forward.flops == 4 * point.tokens * 768 * 64
    assert both.flops == 14 * point.tokens * 768 * 64
    assert adapter_work("merged dense", "both", point) is None  # it is not trained


def test_the_state_of_training_is_what_modules_hold() -> None:
    point = Point("vit_ti", 1, 8, 3, "fp32", "call")
    adapter = Adapter(point, CPU)
    module = adapter.module(adapter.drawn.layers[0])
    for provider, held in (("cpu", module), ("N copies", adapter.copies[0])):
        masks = sum(b.numel() * b.itemsize for name, b in held.named_buffers() if name.endswith(("mask", "assignment")))
        parameters = sum(p.numel() * p.itemsize for p in held.parameters())
        assert training_state(provider, point) == 4 * parameters + masks
