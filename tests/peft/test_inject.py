from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import mvitv2
from timm_models import FAMILIES, SWIN, VIT, Family, images, make, train_a_little
from torch import nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.peft import MoSAConfig, UnknownModelError, adapter_names, delete_adapter, inject_adapter
from mosa_kernels.peft.book import book_of
from mosa_kernels.peft.placement import find_blocks


def adapters(model: nn.Module, name: str = "default") -> list[FusedMoSAAdapter]:
    return [adapter for _, _, adapter in book_of(model).adapters(name)]


def passes_contiguous_tokens_on(model: nn.Module, x: torch.Tensor) -> bool:
    seen: list[bool] = []
    hook = find_blocks(model)[0].block.register_forward_hook(
        lambda _, given, out: seen.append(given[0].is_contiguous())
    )
    model(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(family: Family) -> None:
    model, x = make(family).requires_grad_(False), images(family)  # torch multiplies by frozen weights in another way
    keys, before = list(model.state_dict()), model(x)
    exact = passes_contiguous_tokens_on(model, x)
    for style in family.styles:
        inject_adapter(model, MoSAConfig(style=style, bottleneck=4), style)
        if exact:
            assert torch.equal(model(x), before)
        else:  # transposed, as of a ViT without a class token; an adapter's are contiguous: other sums in what follows
            torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
        assert set(keys) <= set(model.state_dict())
        train_a_little(model, style)
        assert not torch.allclose(model(x), before, atol=1e-4)
    for style in family.styles:
        delete_adapter(model, style)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if "houlsby" not in family.styles], ids=lambda f: f.name
)
def test_a_style_that_does_not_fit_the_blocks_is_refused(family: Family) -> None:
    model = make(family)
    keys = list(model.state_dict())
    fit = " or ".join(map(repr, family.styles))
    with pytest.raises(
        ValueError, match=rf"style: 'houlsby' does not reach .* no module of its own.*; expected {fit}$"
    ):
        inject_adapter(model, MoSAConfig(style="houlsby"))
    if "lora" not in family.styles:
        with pytest.raises(
            ValueError, match=r"style: 'lora' does not reach 'q' of \w+ at blocks.0: .* has no attention"
        ):
            inject_adapter(model, MoSAConfig(style="lora"))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "found none in ResNet"),
        ("mobilevit_xxs", "a part of the model"),
        ("crossvit_9_240", "not known"),
        ("efficientnet_b0", r"not known, torch\.nn\.modules\.container\.Sequential at blocks\.0"),
        ("tnt_s_patch16_224", r"tnt\.Block at blocks\.0"),
        ("xcit_nano_12_p16_224", r"xcit\.XCABlock at blocks\.0"),
    ],
)
def test_models_whose_blocks_are_not_known_are_refused_whole(name: str, reason: str) -> None:
    model = timm.create_model(name)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UnknownModelError, match=reason):
        inject_adapter(model, MoSAConfig())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def test_a_model_with_an_ffn_that_widens_the_tokens_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = replace(mvitv2.model_cfgs["small"], expand_attn=False)  # as mvitv2_large has it
    monkeypatch.setitem(mvitv2.model_cfgs, "narrow", narrow)
    model = timm.create_model("mvitv2_tiny", cfg_variant="narrow", img_size=32)
    keys = list(model.state_dict())
    with pytest.raises(UnknownModelError, match=r"block at stages\.0\.blocks\.0 whose FFN .*\(shortcut_proj_mlp\)"):
        inject_adapter(model, MoSAConfig())
    assert list(model.state_dict()) == keys


def test_a_block_with_a_forward_of_its_own_is_not_taken_for_timms() -> None:
    class Sparser(timm.models.vision_transformer.Block):
        def forward(self, x: torch.Tensor, attn_mask: object = None, is_causal: bool = False) -> torch.Tensor:
            return super().forward(x) / 2

    model = make()
    model.blocks[1].__class__ = Sparser
    with pytest.raises(UnknownModelError, match=r"Sparser at blocks\.1"):
        inject_adapter(model, MoSAConfig())


@pytest.mark.parametrize("mode", ["dense", "pruned", "mosa"])
def test_gradients_reach_adapters_and_head_and_nothing_else(mode: str) -> None:
    model = inject_adapter(make(), MoSAConfig(mode=mode, bottleneck=4)).train()
    train_a_little(model)
    model(images()).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {f"blocks.{i}.mosa.default.parallel_ffn." for i in range(2)} | {"head."}
    assert {name for name in reached if not name.startswith(tuple(wanted))} == set()
    assert {"head.weight", "head.bias"} < reached
    for adapter in adapters(model):
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
def test_the_backbone_draws_nothing_at_random_in_training(family: Family) -> None:
    model = make(family, drop_path_rate=0.5, drop_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5)
    x = images(family)
    before = model(x)
    inject_adapter(model.train(), MoSAConfig(mode="dense", bottleneck=4))
    assert torch.equal(model(x), before)
    assert torch.equal(model.eval().train()(x), before)
    assert model.training
    assert all(adapter.training for adapter in adapters(model))
    delete_adapter(model, "default")
    assert not torch.equal(model(x), before), "the backbone's own regularisation is back"


def test_adapters_put_in_under_inference_mode_train() -> None:
    model = make()
    with torch.inference_mode():
        inject_adapter(model, MoSAConfig(bottleneck=4), num_classes=3)
        inject_adapter(make(), MoSAConfig(bottleneck=4))(images())  # into a backbone that never trains
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_frozen_batch_norm_stands_still() -> None:
    model = make()
    model.patch_embed.norm = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2))
    model.norm_pre = nn.BatchNorm1d(5)
    inject_adapter(model, MoSAConfig()).train()
    model(images())
    assert torch.equal(model.norm_pre.running_mean, torch.zeros(5))


@pytest.mark.parametrize(("layers", "expected"), [(None, {0, 1, 2, 3}), ([1], {1}), ([-1, 0], {0, 3})])
def test_layers_count_through_the_stages(layers: list[int] | None, expected: set[int]) -> None:
    model = inject_adapter(make(SWIN), MoSAConfig(layers=layers, bottleneck=4))  # type: ignore[arg-type]
    paths = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
    assert {path for path, _, _ in book_of(model).adapters("default")} == {paths[index] for index in expected}


@pytest.mark.parametrize("layers", [[4], [-5], [0, -4]])
def test_layers_out_of_range_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="layers: expected"):
        inject_adapter(make(SWIN), MoSAConfig(layers=layers))  # type: ignore[arg-type]


def test_every_layer_has_a_split_of_its_own_that_the_seed_decides() -> None:
    def splits(seed: int, layers: list[int] | None = None) -> list[torch.Tensor]:
        config = MoSAConfig(seed=seed, bottleneck=4, layers=layers)  # type: ignore[arg-type]
        return [adapter.up.assignment for adapter in adapters(inject_adapter(make(), config))]

    first, again, other, last = splits(0), splits(0), splits(1), splits(0, [1])
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(last[0], first[1]), "a block's split does not depend on which others have adapters"


def test_modes_make_the_layers_they_name() -> None:
    dense = adapters(inject_adapter(make(), MoSAConfig(mode="dense")))[0]
    assert dense.num_experts == 1
    assert dense.up.assignment is None
    pruned = adapters(inject_adapter(make(), MoSAConfig(mode="pruned", num_experts=3)))[0]
    assert pruned.pruned
    mosa = adapters(inject_adapter(make(), MoSAConfig(expert_scale="N", anchored=True, learnable_scale=True)))[0]
    assert (mosa.num_experts, mosa.expert_scale, mosa.sampler.anchored) == (4, 4.0, True)
    assert isinstance(mosa.scale, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_have_the_dtype_of_their_block(dtype: torch.dtype) -> None:
    model, x = make().to(dtype), images().to(dtype)
    before = model(x)
    inject_adapter(model, MoSAConfig())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model(x), before)


def test_heads_of_every_kind() -> None:
    headless = inject_adapter(make(num_classes=0), MoSAConfig())
    assert all(".mosa." in name for name, parameter in headless.named_parameters() if parameter.requires_grad)
    distilled = make(next(family for family in FAMILIES if "distilled" in family.name))
    inject_adapter(distilled, MoSAConfig())
    assert distilled.head.weight.requires_grad
    assert distilled.head_dist.weight.requires_grad
    for family in (VIT, SWIN):
        model = inject_adapter(make(family), MoSAConfig(), num_classes=3)
        assert model(images(family)).shape == (2, 3)
        delete_adapter(model, "default")
        assert model(images(family)).shape == (2, 10)
        assert model.num_classes == 10


def test_names_that_cannot_be() -> None:
    model = inject_adapter(make(), MoSAConfig(), "a")
    for name in ("a", "", "a.b", "train", "keys", "active"):
        with pytest.raises(ValueError, match=r"adapter_name: expected .* got"):
            inject_adapter(model, MoSAConfig(), name)
    with pytest.raises(TypeError, match="config: expected a MoSAConfig, got dict"):
        inject_adapter(model, {"bottleneck": 4}, "b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of 'a', got 'b'"):
        delete_adapter(model, "b")
    assert adapter_names(model) == ["a"]


@pytest.mark.parametrize(
    ("family", "options"),
    [(VIT, {}), (SWIN, {}), (SWIN, {"style": "lora"}), (VIT, {"method": "vpt-shallow"}), (VIT, {"method": "full"})],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
@torch.no_grad()
def test_copies_and_saved_modules_are_independent(family: Family, options: dict) -> None:
    model, x = inject_adapter(make(family), MoSAConfig(bottleneck=4, **options)), images(family)
    train_a_little(model)
    before = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), before)
        assert not other.train().blocks[0].training if family is VIT else not other.train().layers[0].training
        train_a_little(other, seed=9)
        assert not torch.equal(other.eval()(x), before)
        delete_adapter(other, "default")
        assert torch.equal(model(x), before)


@torch.no_grad()
def test_features_and_intermediates_see_the_adapters() -> None:
    model, x = make(), images()
    plain = model.forward_features(x)
    inject_adapter(model, MoSAConfig(bottleneck=4))
    train_a_little(model)
    final, taken = model.forward_intermediates(x, indices=[0, 1], norm=False)
    assert torch.equal(final, model.forward_features(x))
    assert not torch.allclose(final, plain)
    assert len(taken) == 2
    assert len(model.get_intermediate_layers(x, n=2)) == 2


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, options) for family in (VIT, SWIN) for options in ({}, {"style": "lora"}, {"method": "bitfit"})]
    + [(VIT, {"method": "vpt-deep"}), (VIT, {"method": "vpt-shallow"})],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_checkpointing_gives_the_same_gradients(family: Family, options: dict) -> None:
    model, x = inject_adapter(make(family), MoSAConfig(bottleneck=4, dropout=0.5, **options)).train(), images(family)
    train_a_little(model)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(4)
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("around", "where"),
    [
        (lambda model: nn.Sequential(model, nn.ReLU()), r"model\.0"),
        (lambda model: nn.Sequential(nn.ModuleDict({"backbone": model})), r"model\.0\.backbone"),
        (
            lambda _: timm.create_model("vit_tiny_patch16_224", img_size=32, features_only=True, out_indices=(0,)),
            r"model\.model",
        ),
    ],
    ids=["sequential", "nested", "features_only"],
)
def test_a_model_around_the_backbone_is_told_where_that_is(
    around: Callable[[nn.Module], nn.Module], where: str
) -> None:
    model = around(make())
    with pytest.raises(UnknownModelError, match=rf"expected the timm model, got a \w+ around it; pass {where}$"):
        inject_adapter(model, MoSAConfig())
