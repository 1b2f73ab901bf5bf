"""The layer: starts as nothing, trains one expert at a time, and merges without changing what it computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layers import OPTIONS, D, R, layer_oracle, trained_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mosa_kernels as mk
from mosa_kernels.nn.projection import projection_of
from mosa_kernels.nn.sampler import samplers


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fresh_layer_adds_nothing(options: dict) -> None:
    layer = mk.FusedMoSAAdapter(D, **{"bottleneck": R, **options})
    x, residual = torch.randn(4, 7, D), torch.randn(4, 7, D)
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(x), x)
        assert torch.equal(layer(x, residual, add_input=False), residual)


@pytest.mark.parametrize("rule", ["mean", "jigsaw"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merged_is_what_evaluation_computes(options: dict, rule: str) -> None:
    options = {key: value for key, value in options.items() if key != "bottleneck"}
    layer = trained_layer(**{**options, "merge_rule": rule}).eval()
    x, residual = torch.randn(4, 7, D), torch.randn(4, 7, D)
    merged = layer.merge()
    assert isinstance(merged, mk.DenseAdapter)
    torch.testing.assert_close(merged(x, residual), layer(x, residual), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged(x, add_input=False), layer(x, add_input=False), rtol=1e-5, atol=1e-5)

    n = layer.num_experts
    factor = layer.expert_scale / n if rule == "mean" else 1.0
    expected = layer_oracle(layer, x, 0 if layer.pruned else -1, factor)
    torch.testing.assert_close(merged(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_rules_agree_when_experts_are_scaled_by_their_number() -> None:
    layer = trained_layer(expert_scale="N").eval()
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(layer.merge("mean")(x), layer.merge("jigsaw")(x))


def test_mean_rule_is_the_expectation_of_a_drawn_expert() -> None:
    for options in ({}, {"sparse": "down", "activation": "identity"}, {"expert_scale": 2.0}):
        layer = trained_layer(**options).eval()
        x = torch.randn(3, 5, D)
        mean = torch.stack([layer(x, expert=e) for e in range(layer.num_experts)]).mean(0)
        torch.testing.assert_close(layer(x), mean, rtol=1e-5, atol=1e-5)


def test_training_draws_experts_uniformly_and_from_the_seed() -> None:
    layer = trained_layer(num_experts=3).train()
    x = torch.randn(3000, 1, D)
    torch.manual_seed(5)
    out = layer(x)
    torch.manual_seed(5)
    assert torch.equal(out, layer(x))
    single = torch.stack([layer(x, expert=e) for e in range(3)])
    chosen = (single - out).abs().amax((2, 3)).argmin(0)
    assert ((single[chosen, torch.arange(3000)] - out).abs() < 1e-5).all()
    assert (chosen.bincount(minlength=3) - 1000).abs().max() < 5 * (3000 * 2 / 9) ** 0.5

    layer = trained_layer(num_experts=3, expert_per="batch").train()
    single = torch.stack([layer(x, expert=e) for e in range(3)])
    seen = {int((single - layer(x)).abs().amax((1, 2, 3)).argmin()) for _ in range(30)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_checkpointing_replays_expert_and_dropout(use_reentrant: bool, per: str) -> None:
    layers = nn.ModuleList(trained_layer(dropout=0.4, expert_per=per, seed=seed) for seed in range(3)).train()
    x = torch.randn(8, 5, D, requires_grad=True)
    weight = torch.randn_like(x)

    def run(recompute: bool) -> list[Tensor]:
        torch.manual_seed(3)
        out = x
        for layer in layers:
            out = checkpoint(layer, out, use_reentrant=use_reentrant) if recompute else layer(out)
        for parameter in (x, *layers.parameters()):
            parameter.grad = None
        (out * weight).sum().backward()
        return [parameter.grad.clone() for parameter in (x, *layers.parameters())]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("sparse", ["up", "down", "both"])
def test_only_the_running_experts_entries_get_gradients(sparse: str) -> None:
    layer = trained_layer(sparse=sparse).train()
    layer(torch.randn(4, 5, D), expert=torch.tensor([1, 3, 1, 3])).square().sum().backward()
    split = {"up": [layer.up], "down": [layer.down], "both": [layer.up, layer.down]}[sparse]
    for projection in (layer.up, layer.down):
        grad = projection.weight.grad
        assert grad is not None
        if projection not in split:
            assert projection.assignment is None
            assert (grad != 0).all()
            continue
        assert projection.assignment is not None
        ran = (projection.assignment == 1) | (projection.assignment == 3)
        assert (grad[~ran] == 0).all()
        assert not grad[~ran].signbit().any()
        assert (grad[ran] != 0).all()
    assert layer.up.bias.grad is not None
    assert (layer.up.bias.grad != 0).any(1).tolist() == [False, True, False, True]


def test_pruned_layer_keeps_one_fixed_expert() -> None:
    layer = trained_layer(pruned=True).train()
    x = torch.randn(4, 5, D)
    out = layer(x)
    layer.eval()
    assert torch.equal(out, layer(x))
    assert layer.down.assignment is not None
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.down.weight[layer.down.assignment != 0] = 100.0
        changed.up.weight[layer.up.assignment != 0] = 100.0
    assert torch.equal(changed(x), out)
    assert layer.up.bias.shape == (D,)


def test_same_seed_same_split_other_seed_other_split() -> None:
    first, second, other = (mk.FusedMoSAAdapter(D, R, seed=seed).up.assignment for seed in (1, 1, 2))
    assert first is not None
    assert second is not None
    assert other is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_inference_mechanisms() -> None:
    layer = trained_layer().eval()
    x = torch.randn(64, 2, D)
    merged = layer(x)
    with mk.inference_experts(layer, 2):
        assert torch.equal(layer(x), layer(x, expert=2))
    with mk.inference_experts(layer, "stochastic"):
        assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), merged)
    for bad in ("random", 4, -1):
        with pytest.raises(ValueError, match="inference: expected"), mk.inference_experts(layer, bad):
            pass
    for wrong in (1.5, True, [0]):
        with (
            pytest.raises(
                TypeError, match="inference: expected None, 'stochastic' or an expert's number from 0 to 3, got"
            ),
            mk.inference_experts(layer, wrong),  # type: ignore[arg-type]
        ):
            pass
    with pytest.raises(ValueError, match="model: expected adapters"), mk.inference_experts(nn.Linear(2, 2), 0):
        pass


def test_copies_and_moves_keep_what_the_optimizer_needs() -> None:
    layer = trained_layer()
    for again in (layer, copy.deepcopy(layer), _through_pickle(layer), copy.deepcopy(layer).to(torch.float64)):
        assert projection_of(again.up.weight) is again.up
        assert projection_of(again.down.bias) is again.down
        assert samplers(again) == [again.sampler]
    loaded = mk.FusedMoSAAdapter(D, R, seed=9)
    loaded.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, D)
    assert torch.equal(loaded.eval()(x), layer.eval()(x))


def test_a_layer_that_was_on_the_meta_device_trains_again() -> None:
    layer = trained_layer()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    mk.MoSAAdamW(layer)  # watches it
    layer.to("meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    optimizer = mk.MoSAAdamW(layer, lr=0.1)
    layer.train()(torch.randn(2, 3, D), expert=1).sum().backward()
    optimizer.step()
    moved = layer.up.weight != state["up.weight"]
    assert layer.up.assignment[moved].unique().tolist() == [1]


@pytest.mark.parametrize("options", [{}, {"sparse": "both", "granularity": "column"}, {"pruned": True}])
def test_memory_without_values_is_reset_to_a_fresh_layer(options: dict) -> None:
    """As models that are too large to make twice are made: shapes on the meta device, memory, then values."""
    options = {**options, "seed": 3, "scale": 0.5, "learnable_scale": True}
    layer = mk.FusedMoSAAdapter(D, R, **options, device="meta").to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(7)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    fresh = mk.FusedMoSAAdapter(D, R, **options).state_dict()
    assert layer.state_dict().keys() == fresh.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def test_the_split_is_where_the_weights_are() -> None:
    with torch.device("meta"):
        layer = mk.FusedMoSAAdapter(D, R)
        assert layer(torch.randn(2, 3, D)).is_meta
    assert all(tensor.is_meta for tensor in layer.state_dict().values())


def test_gradients_of_each_sample_while_an_optimizer_watches() -> None:
    layer = trained_layer(dropout=0.3).train()
    mk.MoSAAdamW(layer)  # watches it
    assert layer.activity is not None
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (tokens[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")
    found = per_sample(parameters, torch.randn(5, 3, D))
    assert all(len(layer.up.assignment[grad != 0].unique()) == 1 for grad in found["up.weight"])


def test_a_move_that_swaps_tensors() -> None:
    """PyTorch's way for tensors made of others, such as sharded ones; it refuses those that have weak references."""
    layer = trained_layer()
    optimizer = mk.MoSAAdamW(layer)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double().float()
        layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before = layer.up.weight.detach().clone()
    layer.train()(torch.randn(2, 3, D), expert=1).sum().backward()
    optimizer.step()
    assert layer.up.assignment[layer.up.weight != before].unique().tolist() == [1]
    assert projection_of(layer.up.weight) is layer.up


def _through_pickle(layer: nn.Module) -> mk.FusedMoSAAdapter:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_compiled_layer_is_one_graph_and_draws_anew() -> None:
    layer = trained_layer().train()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 3, D)
    single = torch.stack([layer(x, expert=e) for e in range(4)])  # [N, B, T, D]
    first, second = step(x), step(x)
    assert not torch.equal(first, second)
    for out in (first, second):
        assert ((single - out).abs().amax((2, 3)).amin(0) < 1e-5).all()
    out.square().sum().backward()
    assert layer.up.weight.grad is not None
    torch.testing.assert_close(torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")(x), layer(x))


PLACES = [
    ({"dtype": torch.int8}, "dtype: expected a floating-point dtype or None, got torch.int8"),
    ({"dtype": "float32"}, "dtype: expected a floating-point dtype or None, got 'float32'"),
    ({"device": "nonsense"}, "device: expected one that PyTorch knows, such as cpu or cuda:0, got 'nonsense'"),
    ({"device": 1.5}, "device: expected one that PyTorch knows, .* got 1.5"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"bottleneck": 0}, "bottleneck: expected at least 1, got 0"),
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"num_experts": 300}, "num_experts: expected 1 to 255|num_experts: expected at most"),
        ({"sparse": "none"}, "sparse: expected one of up, down, both, got 'none'"),
        ({"merge_rule": "sum"}, "merge_rule: expected one of mean, jigsaw, got 'sum'"),
        ({"dropout": 1.0}, "dropout: expected 0 <= p < 1, got 1.0"),
        ({"expert_scale": "M"}, "expert_scale: expected a number or 'N', got 'M'"),
        ({"expert_per": "token"}, "expert_per: expected one of sample, batch, got 'token'"),
        ({"granularity": "rows"}, "granularity: expected one of"),
        ({"activation": "swish"}, "activation: expected one of"),
        ({"bottleneck": 2.5}, "bottleneck: expected a whole number, got 2.5"),
        ({"num_experts": True}, "num_experts: expected a whole number, got True"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"seed": 2**63}, "seed: expected a whole number of 64 bits, got 9223372036854775808"),
        ({"scale": float("nan")}, "scale: expected a number that is finite, got nan"),
        ({"scale": "1"}, "scale: expected a number, got '1'"),
        ({"expert_scale": float("inf")}, "expert_scale: expected a number or 'N' that is finite, got inf"),
        ({"expert_scale": 0.0}, "expert_scale: expected a positive number or 'N', got 0.0"),
        ({"dropout": None}, "dropout: expected 0 <= p < 1, got None"),
        ({"norm": None}, "norm: expected True or False, got None"),
        ({"expert_bias": "shared"}, "expert_bias: expected True or False, got 'shared'"),
        ({"pruned": 1}, "pruned: expected True or False, got 1"),
        ({"norm_eps": -1.0}, "norm_eps: expected a finite number of at least 0, got -1.0"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number of at least 0, got nan"),
        *PLACES,
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mk.FusedMoSAAdapter(**{"dim": D, "bottleneck": R, **options})


@pytest.mark.parametrize("layer", [mk.DenseAdapter, mk.FusedMoSALoRA])
@pytest.mark.parametrize(("options", "message"), PLACES)
def test_bad_places_are_named_by_all_layers(layer: type[nn.Module], options: dict, message: str) -> None:
    sizes = {mk.DenseAdapter: (D, R), mk.FusedMoSALoRA: (D,)}[layer]
    with pytest.raises((TypeError, ValueError), match=message):
        layer(*sizes, **options)


@pytest.mark.parametrize("expert", [[0, 1], 1.5, True, "0"], ids=repr)
def test_an_expert_of_another_type_is_named(expert: object) -> None:
    layer, x = trained_layer(), torch.randn(2, 3, D)
    with pytest.raises(TypeError, match="expert: expected a number or an integer tensor, got"):
        layer(x, expert=expert)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expert: expected a number from 0 to 3, got"):
        layer.merge(expert=expert)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expert: expected a number from 0 to 0, got 1"):
        trained_layer(pruned=True).merge(expert=1)


def test_bad_rule_is_named() -> None:
    with pytest.raises(ValueError, match="rule: expected one of mean, jigsaw, got 'median'"):
        trained_layer().merge("median")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("per", ["sample", "batch"])
def test_an_empty_batch_trains_nothing(options: dict, per: str) -> None:
    options = {key: value for key, value in options.items() if key != "bottleneck"}
    layer = trained_layer(**options, expert_per=per, dropout=0.3).train()
    leaf = layer.track_activity()
    x = torch.randn(0, 3, D, requires_grad=True)
    for expert in (None, 0, torch.zeros(0, dtype=torch.int64)):
        out = layer(x, torch.randn(0, 3, D), expert=expert)
        assert out.shape == x.shape
        layer.zero_grad()
        out.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
        assert leaf is None or (leaf.grad is not None and not leaf.grad.any())


def test_an_empty_batch_moves_no_expert() -> None:
    layer = trained_layer()
    optimizer = mk.MoSAAdamW(layer, lr=0.1, weight_decay=0.1)
    before = copy.deepcopy(layer.up)
    layer(torch.randn(0, 3, D)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.up.weight, before.weight)
    assert torch.equal(layer.up.bias, before.bias)


def test_tokens_without_a_batch() -> None:
    layer, x = trained_layer(), torch.randn(D)
    with pytest.raises(ValueError, match=r"x: expected \[B, ..., 20\], for an expert is drawn for each .* got \[20\]"):
        layer(x)
    with pytest.raises(ValueError, match=r"x: expected \[B, ..., 20\], got \[\]"):
        layer(x[0])
    expected = layer_oracle(layer, x[None], 2, layer.merged_scale)[0]
    torch.testing.assert_close(layer(x, expert=2).double(), expected, rtol=1e-5, atol=1e-5)
    assert trained_layer(expert_per="batch")(x).shape == (D,)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_computation_not_its_result(gradients: bool) -> None:
    layer = trained_layer().eval()
    first, second = torch.randn(4, 7, D), torch.randn(4, 7, D)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(layer, first)
        torch.testing.assert_close(traced(second), layer(second), rtol=1e-5, atol=1e-5)
