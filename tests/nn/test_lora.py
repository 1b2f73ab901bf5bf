"""Low-rank updates against their definition in float64, by hand (arXiv 2312.02923, Eq. 3 to 8)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mosa_kernels.nn.lora import FusedMoSALoRA
from mosa_kernels.optim import MoSAAdamW

WIDTHS = [(12, 12), (12, 5), (12, 24), (8, 19)]


def made(out: int = 12, into: int = 12, **options: object) -> FusedMoSALoRA:
    """A layer with values everywhere, as after training; a sparse down-projection has moved away from its start."""
    layer = FusedMoSALoRA(into, out, **{"bottleneck": 3, "scale": 0.7, **options})  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (layer.down.weight, layer.up.weight):
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def matrix(layer: FusedMoSALoRA, expert: int) -> Tensor:
    """The update that one expert is, float64 [out, in]."""
    down, up = layer.down.weight.double(), layer.up.weight.double()
    if layer.down.assignment is not None:
        start = layer.down.initial.double()
        down = torch.where(layer.down.assignment == expert, start + layer.expert_scale * (down - start), start)
    if layer.up.assignment is not None:
        up = torch.where(layer.up.assignment == expert, layer.expert_scale * up, 0)
    return 0.7 * up @ down


@pytest.mark.parametrize(("into", "out"), WIDTHS)
@pytest.mark.parametrize("sparse", ["up", "down", "both"])
def test_experts_of_images_against_float64(into: int, out: int, sparse: str) -> None:
    layer = made(out, into, sparse=sparse, expert_scale=1.5).train()
    windows, images = 3, 4
    x, frozen = tokens(images * windows, 5, into), tokens(images * windows, 5, out)
    experts = torch.tensor([2, 0, 3, 2])
    result = layer(x, frozen, expert=experts, samples=images)
    for image, expert in enumerate(experts.tolist()):
        rows = slice(image * windows, (image + 1) * windows)
        expected = frozen[rows].double() + x[rows].double() @ matrix(layer, expert).T
        torch.testing.assert_close(result[rows].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, expert=experts, samples=images), result - frozen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("into", "out"), WIDTHS)
def test_gradients_against_float64_and_zero_elsewhere(into: int, out: int) -> None:
    layer = made(out, into, learnable_scale=True).train()
    x, direction = tokens(2, 5, into).requires_grad_(), tokens(2, 5, out)
    (layer(x, expert=1) * direction).sum().backward()
    down, up = (p.detach().double().requires_grad_() for p in (layer.down.weight, layer.up.weight))
    scale, u = layer.scale.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    owned = layer.up.assignment == 1
    (scale * (u @ down.T @ torch.where(owned, up, 0).T) * direction.double()).sum().backward()
    pairs = [(x, u), (layer.down.weight, down), (layer.up.weight, up), (layer.scale, scale)]
    for ours, truth in pairs:
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-4)
    assert owned.any()
    assert not layer.up.weight.grad[~owned].any()


@pytest.mark.parametrize(("into", "out"), WIDTHS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge_rule": "jigsaw", "sparse": "both"},
        {"expert_scale": "N", "sparse": "down"},
        {"pruned": True},
        {"num_experts": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_evaluation_is_the_merged_update(into: int, out: int, options: dict) -> None:
    layer = made(out, into, **options).eval()
    n = layer.num_experts
    if layer.pruned:
        kept = [torch.where(p.assignment == 0, p.weight.double(), 0) for p in (layer.down, layer.up)]
        expected = 0.7 * kept[1] @ kept[0]
    else:
        factor = 1 / n if layer.merge_rule == "mean" else 1.0
        factor *= layer.expert_scale
        down, up = layer.down.weight.double(), layer.up.weight.double()
        if layer.down.assignment is not None:
            start = layer.down.initial.double()
            down = start + factor * (down - start)
        expected = 0.7 * (up * factor if layer.up.assignment is not None else up) @ down
    x, frozen = tokens(2, 5, into), tokens(2, 5, out)
    torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x, frozen).double(), frozen + x.double() @ expected.T, rtol=1e-4, atol=1e-4)
    linear = layer.merge()
    assert type(linear) is torch.nn.Linear
    assert linear.bias is None
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-4, atol=1e-4)


def test_a_fresh_layer_adds_nothing_and_has_no_biases() -> None:
    layer, x = FusedMoSALoRA(12, 36), tokens(2, 5, 12)
    assert not layer(x).any()
    frozen = tokens(2, 5, 36)
    assert torch.equal(layer(x, frozen), frozen)
    assert {name: list(p.shape) for name, p in layer.named_parameters()} == {
        "down.weight": [16, 12],
        "up.weight": [36, 16],
    }


def test_every_image_draws_whatever_its_windows() -> None:
    layer = made().train()
    x = tokens(1, 1, 12).expand(64 * 3, 5, 12)
    torch.manual_seed(0)
    out = layer(x, samples=64).unflatten(0, (64, 3))
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])
    assert len(out[:, 0, 0].unique(dim=0)) == 4
    torch.manual_seed(0)
    drawn = torch.randint(4, (64,))
    assert torch.equal(out[:, 0], layer(x[:64], expert=drawn))


def test_delta_of_half_precision_is_computed_in_float32() -> None:
    layer = made(24).to(torch.bfloat16)
    expected = 0.7 / 4 * layer.up.weight.double() @ layer.down.weight.double()
    assert layer.delta().dtype == torch.float32
    torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.delta().double(), expected, rtol=1e-5, atol=1e-6)
    assert layer.merge().weight.dtype == torch.bfloat16
    assert layer.double().delta().dtype == torch.float64


@pytest.mark.parametrize("out", [12, 19])
def test_the_optimizer_moves_the_experts_that_ran(out: int) -> None:
    layer = made(out).train()
    before = layer.up.weight.detach().clone()
    optimizer = MoSAAdamW(layer, lr=0.1, weight_decay=0.1)
    layer(tokens(2, 5, 12), expert=torch.tensor([1, 3])).square().sum().backward()
    optimizer.step()
    ran = (layer.up.assignment == 1) | (layer.up.assignment == 3)
    assert torch.equal(layer.up.weight != before, ran)


@pytest.mark.parametrize("out", [5, 24, 30])
def test_backends_see_the_same_owners_until_they_change(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend reads off an assignment, it looks up by the tensor: a new one each time is read each time."""
    layer, seen = made(out).train(), []
    original = layer._run

    def run(*args: Any) -> Tensor:
        seen.append(args[4])
        return original(*args)

    monkeypatch.setattr(layer, "_run", run)
    count = -(-out // 12)
    for _ in range(2):
        layer(tokens(2, 5, 12), expert=1)
    assert [one is other for one, other in zip(seen[:count], seen[count:], strict=True)] == [True] * count
    assert torch.equal(torch.cat(seen[:count])[:out], layer.up.assignment)
    with torch.no_grad():
        layer.up.assignment.copy_(layer.up.assignment.flip(0))
    seen.clear()
    layer(tokens(2, 5, 12), expert=1)
    assert torch.equal(torch.cat(seen)[:out], layer.up.assignment)
    assert copy.deepcopy(layer)._kept is None


def test_an_expert_that_there_is_not() -> None:
    """Nothing but the layer knows how many there are: there is no bias, and no optimizer that counts."""
    layer = made(12).train()
    for expert in (4, -2, torch.tensor([0, 9])):
        with pytest.raises(ValueError, match="expert: expected 0 to 3, or -1 for the merged adapter, got"):
            layer(tokens(2, 5, 12), expert=expert)


def test_dropout_is_one_mask_for_all_pieces() -> None:
    """A wide output is computed in pieces, which have to drop the same entries of the bottleneck."""
    layer = made(24, num_experts=1, dropout=0.5).train()
    with torch.no_grad():
        layer.up.weight[12:] = layer.up.weight[:12]
    out = layer(tokens(4, 9, 12))
    assert torch.equal(out[..., :12], out[..., 12:])
    assert not torch.equal(out, layer.eval()(tokens(4, 9, 12)))


def test_what_it_refuses() -> None:
    layer = made(5)
    with pytest.raises(ValueError, match=r"samples: expected a divisor of x.shape\[0\] = 6, got 4"):
        layer(tokens(6, 2, 12), samples=4)
    with pytest.raises(TypeError, match=r"samples: expected a whole number or None, got 2\.0"):
        layer(tokens(6, 2, 12), samples=2.0)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        layer([1.0])
    with pytest.raises(ValueError, match=r"x: expected \[B, \.\.\., 12\], got \[\]"):
        layer(torch.tensor(1.0), samples=2)
    with pytest.raises(ValueError, match="add_input: expected False for widths 12 and 5"):
        layer(tokens(6, 2, 12), add_input=True)
    for shape in ((6, 2, 12), (1, 2, 5), (6, 2, 1)):
        with pytest.raises(ValueError, match=r"residual: expected shape \[6, 2, 5\] for x \[6, 2, 12\], got"):
            layer(tokens(6, 2, 12), torch.zeros(shape))
    with pytest.raises(ValueError, match="rule: expected one of mean, jigsaw, got 'sum'"):
        layer.delta("sum")
    with pytest.raises(TypeError, match="expert: expected a number from 0 to 3, got True"):
        layer.delta(expert=True)
    with pytest.raises(ValueError, match="scale: expected a number that is finite, got nan"):
        made(scale=float("nan"))
    with pytest.raises(ValueError, match="out_features: expected at least 1, got 0"):
        FusedMoSALoRA(4, 0)
