"""MoSAAdamW on layers, against `torch.optim.AdamW` on a model that holds one masked copy per expert."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mosa_kernels.functional.split import GRANULARITIES
from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.optim import MoSAAdamW

D, R = 6, 8


class Copies(nn.Module):
    """An adapter as the paper writes it (Eq. 1, 2, 5): a full weight per expert, each behind its mask. Float64."""

    def __init__(self, layer: FusedMoSAAdapter) -> None:
        super().__init__()
        self.layer = [layer]  # options only; not a submodule
        n = layer.num_experts

        def copies(t: Tensor, separate: bool) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(t.detach().double().clone()) for _ in range(n if separate else 1))

        self.w_up = copies(layer.up.weight, layer.up.assignment is not None)
        self.w_down = copies(layer.down.weight, layer.down.assignment is not None)
        self.b_down = nn.Parameter(layer.down.bias.detach().double().clone())
        rows = layer.up.bias.detach().double().reshape(-1, D)
        self.b_up = nn.ParameterList(nn.Parameter(row.clone()) for row in rows)
        self.gamma = nn.Parameter(torch.ones(D, dtype=torch.float64))
        self.beta = nn.Parameter(torch.zeros(D, dtype=torch.float64))
        self.scale = nn.Parameter(torch.as_tensor(layer.scale).detach().double().clone())

    def forward(self, x: Tensor, experts: list[int]) -> Tensor:
        """x [B, T, d], an expert for each sample."""
        layer = self.layer[0]
        out = []
        for sample, e in zip(x, experts, strict=True):
            u = F.layer_norm(sample, (D,), self.gamma, self.beta, 1e-6)
            w_down = self.w_down[0]
            if layer.down.assignment is not None:
                w_down = torch.where(layer.down.assignment == e, self.w_down[e], layer.down.initial.double())
            w_up = self.w_up[0]
            if layer.up.assignment is not None:
                w_up = torch.where(layer.up.assignment == e, self.w_up[e], 0)
            b_up = self.b_up[e] if len(self.b_up) > 1 else self.b_up[0]
            y = F.gelu(u @ w_down.T + self.b_down) @ w_up.T + b_up
            out.append(sample + self.scale * y)
        return torch.stack(out)

    def together(self) -> dict[str, Tensor]:
        layer = self.layer[0]

        def of_owners(copies: nn.ParameterList, owner: Tensor | None) -> Tensor:
            if owner is None:
                return copies[0].detach()
            return sum(torch.where(owner == e, c.detach(), 0) for e, c in enumerate(copies))  # type: ignore[return-value]

        found = {
            "norm.weight": self.gamma.detach(),
            "norm.bias": self.beta.detach(),
            "down.weight": of_owners(self.w_down, layer.down.assignment),
            "down.bias": self.b_down.detach(),
            "up.weight": of_owners(self.w_up, layer.up.assignment),
            "up.bias": torch.stack([b.detach() for b in self.b_up]).view(layer.up.bias.shape),
        }
        return {**found, "scale": self.scale.detach()} if isinstance(layer.scale, nn.Parameter) else found


def adapter(dtype: torch.dtype = torch.float64, **options: object) -> FusedMoSAAdapter:
    layer = FusedMoSAAdapter(D, R, dtype=dtype, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.up.weight)
    nn.init.normal_(layer.up.bias)
    return layer


@settings(max_examples=20)
@given(
    num_experts=st.integers(1, 5),
    sparse=st.sampled_from(("up", "down", "both")),
    granularity=st.sampled_from(GRANULARITIES),
    expert_bias=st.booleans(),
    pruned=st.booleans(),
    learnable_scale=st.booleans(),
    weight_decay=st.sampled_from((0.0, 0.1)),
    to_none=st.booleans(),
    data=st.data(),
)
def test_equals_adamw_on_masked_copies(
    num_experts, sparse, granularity, expert_bias, pruned, learnable_scale, weight_decay, to_none, data
) -> None:
    if granularity == "block":
        num_experts = 1  # a single tile
    layer = adapter(
        num_experts=num_experts,
        sparse=sparse,
        granularity=granularity,
        expert_bias=expert_bias,
        pruned=pruned,
        learnable_scale=learnable_scale,
    )
    naive = Copies(layer)
    if not learnable_scale:
        naive.scale.requires_grad_(False)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    ours, plain = MoSAAdamW(layer, **options), torch.optim.AdamW(naive.parameters(), foreach=False, **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6) for optimizer in (ours, plain)]
    fixed = pruned and num_experts > 1
    drawn = st.just(0) if fixed else st.integers(0, num_experts - 1)
    for _ in range(6):
        ours.zero_grad(set_to_none=to_none)
        plain.zero_grad()
        for _ in range(data.draw(st.integers(1, 2))):  # accumulated
            experts = data.draw(st.lists(drawn, min_size=3, max_size=3))
            x, weights = torch.randn(2, 3, 4, D, dtype=torch.float64)
            (layer(x, expert=torch.tensor(experts)) * weights).sum().backward()
            (naive(x, experts) * weights).sum().backward()
        for optimizer, schedule in zip((ours, plain), schedules, strict=True):
            optimizer.step()
            schedule.step()
    expected = naive.together()
    assert expected.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        if fixed and name == "up.weight":
            keep = layer.up.assignment == 0
            torch.testing.assert_close(parameter.detach()[keep], expected[name][keep], rtol=1e-9, atol=1e-9)
            continue
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved_experts(layer: FusedMoSAAdapter, before: Tensor) -> list[int]:
    """The experts with a changed entry in the up-projection; each moves with all its entries or not at all."""
    changed = layer.up.weight.detach() != before
    found = []
    for e in range(layer.num_experts):
        share = changed[layer.up.assignment == e].double().mean().item()
        assert share in (0.0, 1.0), f"expert {e} moved {share:.0%} of its entries"
        found += [e] if share else []
    return found


def backward(layer: nn.Module, expert: object, factor: float = 1.0) -> None:
    expert = torch.as_tensor(expert) if isinstance(expert, list) else expert
    x = torch.randn(4, 3, D, dtype=torch.float64)
    (factor * (layer(x, expert=expert) * torch.randn_like(x)).sum()).backward()


def step_and_see(layer: FusedMoSAAdapter, optimizer: torch.optim.Optimizer) -> list[int]:
    before = layer.up.weight.detach().clone()
    optimizer.step()
    return moved_experts(layer, before)


CLEAR: dict[str, Callable[[nn.Module, torch.optim.Optimizer], None]] = {
    "optimizer, none": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model, none": lambda model, optimizer: model.zero_grad(),
    "model, zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clear", CLEAR.values(), ids=CLEAR)
@pytest.mark.parametrize("order", ["before forward", "before backward", "after step"])
def test_every_loop_order(clear: Callable[..., None], order: str) -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    for experts in ([0], [1], [1], [3], [2, 0], [1]):
        if order == "before forward":
            clear(layer, optimizer)
        if order == "before backward":
            loss = sum(layer(torch.randn(2, 3, D, dtype=torch.float64), expert=e).square().sum() for e in experts)
            clear(layer, optimizer)
            loss.backward()
        else:
            for e in experts:
                backward(layer, e)
        assert step_and_see(layer, optimizer) == sorted(experts)
        if order == "after step":
            clear(layer, optimizer)


@pytest.mark.parametrize("clear", CLEAR.values(), ids=CLEAR)
def test_a_step_that_was_skipped_does_not_count(clear: Callable[..., None]) -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    backward(layer, 0)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    clear(layer, optimizer)
    backward(layer, 2)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    assert step_and_see(layer, optimizer) == [2]
    assert optimizer.state[layer.up.weight]["step"].tolist() == [0, 0, 1, 0]
    assert optimizer.state[layer.up.bias]["step"].tolist() == [0, 0, 1, 0]
    assert optimizer.state[layer.down.weight]["step"].item() == 1


def test_without_clearing_the_gradient_keeps_its_experts() -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    backward(layer, 0)
    assert step_and_see(layer, optimizer) == [0]
    assert step_and_see(layer, optimizer) == [0]
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
    backward(layer, 3)
    assert step_and_see(layer, optimizer) == [0, 3]


def test_experts_per_sample_and_merged_passes() -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    backward(layer, [1, 3, 3, 1])
    assert step_and_see(layer, optimizer) == [1, 3]
    optimizer.zero_grad()
    backward(layer, [2, 2, 2, -1])
    assert step_and_see(layer, optimizer) == [0, 1, 2, 3]


def test_a_forward_without_backward_does_not_count() -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    layer(torch.randn(1, 2, D, dtype=torch.float64), expert=0)
    backward(layer, 1)
    with torch.no_grad():
        layer(torch.randn(1, 2, D, dtype=torch.float64), expert=2)
    assert step_and_see(layer, optimizer) == [1]


def test_an_active_expert_with_a_gradient_of_zero_counts() -> None:
    layer = adapter(num_experts=3)
    optimizer = MoSAAdamW(layer)
    backward(layer, 0)
    optimizer.step()
    optimizer.zero_grad()
    backward(layer, 0, factor=0.0)
    backward(layer, 1)
    assert step_and_see(layer, optimizer) == [0, 1]  # 0 by its momentum
    assert optimizer.state[layer.up.weight]["step"].tolist() == [2, 1, 0]


def test_nothing_moves_without_a_backward_pass() -> None:
    layer = adapter(num_experts=3)
    optimizer = MoSAAdamW(layer)
    before = copy.deepcopy(layer.state_dict())
    optimizer.step()
    backward(layer, 1)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_gradients_of_unknown_origin_count_for_all_experts() -> None:
    layer = adapter(num_experts=3)
    optimizer = MoSAAdamW(layer)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    parameters = list(layer.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(layer(x, expert=1).sum(), parameters), strict=True):
        parameter.grad = grad + 1
    assert step_and_see(layer, optimizer) == [0, 1, 2]
    optimizer.zero_grad()
    layer.eval()(x).square().sum().backward()
    assert step_and_see(layer, optimizer) == [0, 1, 2]
    optimizer.zero_grad()
    backward(layer.train(), 2)
    torch.autograd.grad(layer(x, expert=0).sum(), layer.up.weight)  # does not contribute
    assert step_and_see(layer, optimizer) == [2]


def test_flags_of_a_cleared_gradient_are_forgotten_whatever_they_hold() -> None:
    """A replayed CUDA graph finds them overwritten."""
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    backward(layer, 2)
    optimizer.step()
    for history in optimizer._histories.values():
        assert history._flags is not None
        history._flags = torch.full_like(history._flags, torch.nan)
    optimizer.zero_grad(set_to_none=False)
    backward(layer, 1)
    assert step_and_see(layer, optimizer) == [1]


def test_a_layer_used_twice_in_one_pass() -> None:
    layer = adapter(num_experts=4)
    optimizer = MoSAAdamW(layer)
    x = torch.randn(2, 3, D, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        layer(layer(x, expert=0), expert=2).square().sum().backward()
        assert step_and_see(layer, optimizer) == [0, 2]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    layer = adapter(num_experts=4, expert_per="batch")
    optimizer = MoSAAdamW(layer)
    drawn: list[int] = []
    layer.sampler.register_forward_hook(lambda _, __, draw: drawn.append(int(draw.expert)))
    for _ in range(4):
        drawn.clear()
        layer.zero_grad()
        x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert len(drawn) == 2
        assert step_and_see(layer, optimizer) == sorted(set(drawn))


def test_compiled_layer() -> None:
    layer = adapter(num_experts=4, dtype=torch.float32)
    optimizer = MoSAAdamW(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for experts in ([0, 1], [3, 3], [2, 0]):
        layer.zero_grad()
        compiled(torch.randn(2, 3, D), expert=torch.tensor(experts)).square().sum().backward()
        assert step_and_see(layer, optimizer) == sorted(set(experts))


@pytest.mark.parametrize("options", [{}, {"sparse": "both"}, {"expert_bias": False}])
def test_a_step_within_the_backward_pass_moves_what_ran(options: dict) -> None:
    """An optimizer per parameter, stepped as its gradient arrives: the reports of the experts may come later."""
    together = nn.Sequential(*(adapter(num_experts=3, dtype=torch.float32, **options) for _ in range(3)))
    apart = copy.deepcopy(together)
    optimizer = MoSAAdamW(together)
    each = {parameter: MoSAAdamW([parameter]) for parameter in apart.parameters()}

    def step(parameter: Tensor) -> None:
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in each:
        parameter.register_post_accumulate_grad_hook(step)
    torch.manual_seed(0)
    for expert in (1, 1, 0, 2):
        x = torch.randn(2, 3, D)
        for model in (together, apart):
            out = x
            for layer in model:
                out = layer(out, expert=expert)
            out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(one, other, msg=name)


def test_two_optimizers_and_a_discarded_one() -> None:
    layer = adapter(num_experts=3)
    discarded = MoSAAdamW(layer)
    weights = MoSAAdamW([layer.up.weight, layer.down.weight])
    biases = MoSAAdamW([layer.up.bias])
    hooks = len(layer.activity._backward_hooks)
    del discarded
    gc.collect()
    assert len(layer.activity._backward_hooks) == hooks - 2
    backward(layer, 0)
    weights.zero_grad()
    backward(layer, 1)
    weights.step()
    biases.step()
    assert weights.state[layer.up.weight]["step"].tolist() == [0, 1, 0]
    assert biases.state[layer.up.bias]["step"].tolist() == [1, 1, 0]


def small_model() -> nn.Sequential:
    return nn.Sequential(adapter(num_experts=3, sparse="both", dtype=torch.float32), nn.Linear(D, 2))


def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, D)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["state_dict", "safetensors", "deepcopy"])
def test_resumes_exactly_on_another_model(how: str, tmp_path: Path) -> None:
    model = small_model()
    optimizer = MoSAAdamW(model, lr=0.1)
    train(model, optimizer, 5, seed=1)
    other: nn.Sequential
    if how == "deepcopy":
        other, resumed = copy.deepcopy((model, optimizer))
        assert resumed.param_groups[0]["params"][0] is next(other.parameters())
    else:
        other = small_model()
        other.load_state_dict(model.state_dict())
        resumed = MoSAAdamW(other)
        state = copy.deepcopy(optimizer.state_dict())
        if how == "safetensors":
            file = tmp_path / "optimizer.safetensors"
            save_file({f"{i}.{name}": t for i, item in state["state"].items() for name, t in item.items()}, file)
            loaded = load_file(file)
            state["state"] = {i: {name: loaded[f"{i}.{name}"] for name in item} for i, item in state["state"].items()}
        resumed.load_state_dict(state)
    train(model, optimizer, 5, seed=2)
    train(other, resumed, 5, seed=2)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not torch.equal(resumed.state[other[0].up.weight]["step"], torch.zeros(3))


def test_takes_over_the_state_of_adamw_and_refuses_other_expert_counts() -> None:
    model = small_model()
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, 3, seed=0)
    optimizer = MoSAAdamW(model)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[model[0].up.weight]["step"].tolist() == [3, 3, 3]
    train(model, optimizer, 1, seed=0)
    state = copy.deepcopy(optimizer.state_dict())
    other = MoSAAdamW(nn.Sequential(adapter(num_experts=4, sparse="both", dtype=torch.float32), nn.Linear(D, 2)))
    with pytest.raises(ValueError, match=r"state_dict: expected step counts of shape \[4\], got \[3\]"):
        other.load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "model last"])
def test_a_copied_optimizer_goes_on(how: str) -> None:
    """Alone, or before its model: the copy's parameters then belong to no module yet."""
    model = small_model()
    optimizer = MoSAAdamW(model, lr=0.1)
    train(model, optimizer, 3, seed=1)
    if how == "model last":
        resumed, other = copy.deepcopy((optimizer, model))
        train(model, optimizer, 4, seed=2)
        train(other, resumed, 4, seed=2)
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs), name
        return
    if how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        resumed = torch.load(buffer, weights_only=False)
    again = small_model()
    again.load_state_dict(model.state_dict())
    heir = MoSAAdamW(again)
    heir.load_state_dict(resumed.state_dict())
    train(model, optimizer, 4, seed=2)
    train(again, heir, 4, seed=2)
    for (name, mine), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    with pytest.raises(ValueError, match=r"state_dict: expected step counts of shape \[\], got \[3\]"):
        resumed.step()  # its parameters are nobody's


@pytest.mark.parametrize("sparse", ["up", "both"])
def test_a_gradient_that_the_user_makes_moves_the_experts_it_is_from(sparse: str) -> None:
    layer = adapter(num_experts=3, sparse=sparse)
    optimizer = MoSAAdamW(layer, lr=1e-2, weight_decay=0.1)
    parts = []
    for expert in (0, 2):
        optimizer.zero_grad()
        backward(layer, expert)
        parts.append([parameter.grad.clone() for parameter in layer.parameters()])
    for parameter, *grads in zip(layer.parameters(), *parts, strict=True):
        parameter.grad = sum(grads)
    assert step_and_see(layer, optimizer) == [0, 2]
    optimizer.zero_grad()
    backward(layer, 0)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    backward(layer, 1)
    assert step_and_see(layer, optimizer) == [1]


def test_copies_pickles_and_moves_keep_their_experts() -> None:
    layer = adapter(num_experts=3)
    watched = MoSAAdamW(layer)
    twin = copy.deepcopy(layer)
    assert twin.activity is None
    buffer = io.BytesIO()
    layer.zero_grad()
    torch.save(twin, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert other.up.activity is other.down.activity is not layer.up.activity
        optimizer = MoSAAdamW(other)
        backward(other, 2)
        assert step_and_see(other, optimizer) == [2]
    layer.to(torch.float32).to(torch.float64)
    backward(layer, 1)
    assert step_and_see(layer, watched) == [1]
    layer.load_state_dict({name: t.clone() for name, t in layer.state_dict().items()}, assign=True)
    again = MoSAAdamW(layer)
    backward(layer, 0)
    assert step_and_see(layer, again) == [0]


def test_groups_names_and_frozen_parameters() -> None:
    model = small_model()
    head, layer = list(model[1].parameters()), model[0]
    layer.norm.weight.requires_grad_(False)
    optimizer = MoSAAdamW(
        [{"params": layer.parameters(), "weight_decay": 0.5}, {"params": head, "lr": 0.0}], lr=0.1, betas=(0.5, 0.5)
    )
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.1, 0.5), (0.0, 0.01)]
    before = [p.detach().clone() for p in head]
    train(model, optimizer, 2, seed=0)
    assert all(torch.equal(p, q) for p, q in zip(head, before, strict=True))
    assert torch.equal(layer.norm.weight, torch.ones(D))
    assert layer.norm.weight not in optimizer.state
    named = MoSAAdamW(model.named_parameters())
    assert named.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert len(MoSAAdamW(model).param_groups[0]["params"]) == len(list(model.parameters())) - 1
    late = MoSAAdamW(head)
    late.add_param_group({"params": [layer.up.weight]})
    layer.double()
    backward(layer, 1)
    assert step_and_see(layer, late) == [1]


def test_a_split_parameter_that_thaws() -> None:
    layer = adapter(num_experts=3)
    layer.up.weight.requires_grad_(False)
    optimizer = MoSAAdamW(layer.parameters())
    assert not layer.up.weight.requires_grad
    backward(layer, 0)
    assert step_and_see(layer, optimizer) == []
    layer.up.weight.requires_grad_(True)
    optimizer.zero_grad()
    backward(layer, 1)
    assert step_and_see(layer, optimizer) == [1]


def test_maximize_and_closure() -> None:
    results = []
    for sign, maximize in ((1, False), (-1, True)):
        torch.manual_seed(0)
        model = small_model()
        optimizer = MoSAAdamW(model, maximize=maximize)

        def closure(model: nn.Sequential = model, optimizer: MoSAAdamW = optimizer, sign: int = sign) -> Tensor:
            optimizer.zero_grad()
            loss = sign * model(torch.ones(2, 3, D)).square().sum()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert torch.is_tensor(loss)
        assert loss != 0
        results.append([p.detach() for p in model.parameters()])
    for descended, climbed in zip(*results, strict=True):
        assert torch.equal(descended, climbed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_counts_and_activity_are_float32_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)  # bfloat16 cannot count beyond 256
    try:
        layer = FusedMoSAAdapter(D, R, num_experts=3)
        optimizer = MoSAAdamW(layer)
        for expert in (0, 2, 0):
            optimizer.zero_grad()
            layer(torch.randn(2, 3, D), expert=expert).square().sum().backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.up.weight.dtype == dtype
    steps = optimizer.state[layer.up.weight]["step"]
    assert (steps.dtype, steps.tolist()) == (torch.float32, [2, 0, 1])
    assert optimizer.state[layer.down.weight]["step"].dtype == torch.float32


def test_grad_scaler_skips_a_step_whole() -> None:
    layer = adapter(num_experts=3, dtype=torch.float32)
    optimizer = MoSAAdamW(layer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def run(expert: int, factor: float) -> list[int]:
        layer.zero_grad(set_to_none=False)
        loss = factor * layer(torch.randn(2, 3, D), expert=expert).square().sum()
        scaler.scale(loss).backward()
        before = layer.up.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        return moved_experts(layer, before)

    assert run(0, 1.0) == [0]
    assert run(1, float("inf")) == []
    assert run(2, 1.0) == [2]
    assert optimizer.state[layer.up.weight]["step"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of at least 0, got -1.0"),
        ({"lr": "fast"}, "lr: expected .* got 'fast'"),
        ({"lr": float("nan")}, "lr: expected .* got nan"),
        ({"eps": -1e-8}, "eps: expected .* got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected .* got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas: expected two numbers .* got \(0.9,\)"),
        ({"betas": ("high", 0.9)}, r"betas: expected two numbers .* got \('high', 0.9\)"),
        ({"betas": 0.9}, "betas: expected two numbers .* got 0.9"),
        ({"lr": torch.ones(2)}, r"lr: expected .* got tensor\(\[1., 1.\]\)"),
        ({"maximize": "yes"}, "maximize: expected True or False, got 'yes'"),
        ({"backend": "fast"}, "backend: expected one of .* got 'fast'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MoSAAdamW(small_model(), **options)  # type: ignore[arg-type]
    if "backend" not in options:
        optimizer = MoSAAdamW(small_model())
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **options})
        assert len(optimizer.param_groups) == 1


def test_refuses_nothing_to_train_and_sparse_gradients() -> None:
    with pytest.raises(ValueError, match="params: expected a module with trainable parameters"):
        MoSAAdamW(small_model().requires_grad_(False))
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"params: expected dense gradients, got layout .*sparse_coo"):
        MoSAAdamW(embedding).step()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = adapter(num_experts=4)
    model = nn.parallel.DistributedDataParallel(layer)
    optimizer = MoSAAdamW(layer)
    seen = []
    for per_rank in ((0, 2), (1, 1), (3, 0)):
        optimizer.zero_grad()
        backward(model, per_rank[rank])
        seen.append(step_and_see(layer, optimizer))
    save_file({name: t.contiguous() for name, t in layer.state_dict().items()}, f"{folder}/{rank}.safetensors")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = torch.distributed.tensor.distribute_tensor(layer.up.weight, mesh, [torch.distributed.tensor.Shard(1)])
    with pytest.raises(TypeError, match="params: expected whole tensors, or DTensors divided"):
        MoSAAdamW([nn.Parameter(sharded)])
    torch.distributed.destroy_process_group()
    assert seen == [[0, 2], [1], [0, 3]], seen


def test_all_ranks_move_the_same_entries(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
