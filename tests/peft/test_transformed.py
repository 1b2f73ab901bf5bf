"""Backbones of which somebody has made another thing: weights that are shared, packed, computed or of a class of their
own, forwards that were replaced, and the parts of a model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm_models import SWIN, VIT, Family, family_of, images, make, train_a_little
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrize

import mosa_kernels as mk
from mosa_kernels.peft import (
    BackboneMismatchError,
    UnknownModelError,
    disable_adapter,
    merge_adapter,
    set_adapter,
    unmerge_adapter,
)


def tied() -> nn.Module:
    """Both blocks have one FFN's first layer, by its parameters."""
    model = make()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].mlp.fc1.bias = model.blocks[0].mlp.fc1.bias
    return model


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_parameter_in_two_places_trains_in_both(method: str, tmp_path: Path) -> None:
    model, x = mk.inject_adapter(tied(), mk.MoSAConfig(method=method)), images()
    first, second = (block.mlp.fc1 for block in model.blocks)
    before = model(x)
    assert second.bias is first.bias
    assert second.bias.requires_grad
    train_a_little(model)
    expected = model(x)
    assert not torch.allclose(expected, before, atol=1e-4)
    with disable_adapter(model):
        assert torch.equal(model(x), before)
        assert second.bias is first.bias
    assert torch.equal(model(x), expected)
    mk.save_adapter(model, tmp_path)
    assert torch.equal(mk.load_adapter(tied(), tmp_path)(x), expected)
    assert torch.equal(mk.merge_and_unload(model)(x), expected)
    assert second.bias is first.bias


@torch.no_grad()
def test_a_shared_parameter_that_was_unfrozen_comes_back(tmp_path: Path) -> None:
    model, x = mk.inject_adapter(tied(), mk.MoSAConfig(bottleneck=4)), images()
    train_a_little(model)
    model.blocks[1].mlp.fc1.weight.requires_grad_(True).add_(0.3)
    mk.save_adapter(model, tmp_path)
    loaded = mk.load_adapter(tied(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    mk.save_adapter(loaded, tmp_path / "again")
    assert torch.equal(mk.load_adapter(tied(), tmp_path / "again")(x), model(x))
    other = tied()
    other.blocks[0].norm1.weight[0] += 1e-3
    with pytest.raises(BackboneMismatchError, match="hash of the weights"):
        mk.load_adapter(other, tmp_path)


def _share_weight(model: nn.Module) -> None:
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight


def _share_module(model: nn.Module) -> None:
    model.blocks[1].attn = model.blocks[0].attn


@pytest.mark.parametrize("layers", [None, (1,)])
@pytest.mark.parametrize("share", [_share_weight, _share_module])
@torch.no_grad()
def test_updates_of_one_block_do_not_fold_into_weights_of_another(
    share: Callable[[nn.Module], None], layers: tuple[int, ...] | None
) -> None:
    model, x = make(), images()
    share(model)
    mk.inject_adapter(model, mk.MoSAConfig(style="lora", bottleneck=4, layers=layers))
    train_a_little(model)
    before = model(x)
    for merge in (merge_adapter, mk.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"\.attn\.qkv\.weight in one block alone, .* blocks\.0 and blocks\.1 share"
        ):
            merge(model)
        assert torch.equal(model(x), before)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("old", [False, True], ids=["parametrised", "weight_norm"])
@torch.no_grad()
def test_a_weight_that_is_computed_takes_no_update(old: bool) -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(style="lora", bottleneck=4)), images()
    layer = model.blocks[1].attn.qkv
    if old:
        torch.nn.utils.weight_norm(layer)
    else:
        parametrize.register_parametrization(layer, "weight", Halved())
    train_a_little(model)
    before = model(x)
    for merge in (merge_adapter, mk.merge_and_unload):
        with pytest.raises(ValueError, match=r"expected blocks\.1\.attn\.qkv\.weight to be a parameter"):
            merge(model)
        assert torch.equal(model(x), before)
    if old:
        torch.nn.utils.remove_weight_norm(layer)
    else:
        parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(mk.merge_and_unload(model)(x), before, rtol=1e-4, atol=1e-4)


class Codes(Tensor):
    """A weight in int8 that calls itself float32, as torchao's do, and lends its memory to nobody."""

    codes: Tensor
    step: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, step: Tensor) -> Codes:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype, device=codes.device)

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        self.codes, self.step = codes, step

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "step"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.step * weight.codes, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].step)
        raise NotImplementedError(f"{func}")


def coded() -> nn.Module:
    model = make()
    for block in model.blocks:
        weight = block.attn.qkv.weight.detach()
        step = weight.abs().max() / 127
        block.attn.qkv.weight = nn.Parameter(Codes((weight / step).round().to(torch.int8), step), requires_grad=False)
    return model


@pytest.mark.parametrize("style", ["adaptformer", "lora"])
@torch.no_grad()
def test_weights_of_a_class_of_their_own_are_told_from_others(style: str, tmp_path: Path) -> None:
    model, x = mk.inject_adapter(coded(), mk.MoSAConfig(style=style, bottleneck=4)), images()
    train_a_little(model)
    before = model(x)
    mk.save_adapter(model, tmp_path)
    assert torch.equal(mk.load_adapter(coded(), tmp_path)(x), before)
    for other in (coded(), make()):
        weight = other.blocks[0].attn.qkv.weight
        (weight.codes if isinstance(weight, Codes) else weight)[0, 0] += 1
        with pytest.raises(BackboneMismatchError, match="the names and shapes agree"):
            mk.load_adapter(other, tmp_path)
    whole = mk.load_adapter(make(), tmp_path, ignore_backbone_hash=True)
    torch.testing.assert_close(mk.merge_and_unload(whole)(x), before, rtol=0.1, atol=0.1)
    if style == "lora":
        for merge in (merge_adapter, mk.merge_and_unload):
            with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight in floating point, .* got Codes"):
                merge(model)
    else:
        mk.merge_and_unload(model)
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_takes_no_weights_of_a_class_of_their_own() -> None:
    with pytest.raises(ValueError, match=r"'full' trains blocks\.0\.attn\.qkv\.weight, which is quantised to Codes"):
        mk.inject_adapter(coded(), mk.MoSAConfig(method="full"))
    mk.inject_adapter(coded(), mk.MoSAConfig(method="bitfit"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_packed_weights_run_and_merge_but_tell_no_backbone(tmp_path: Path) -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(bottleneck=4)), images()
    train_a_little(model)
    mk.save_adapter(model, tmp_path)
    packed = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected = packed(x)
    torch.testing.assert_close(expected, model(x), rtol=0.2, atol=0.2)
    assert mk.trainable_parameters(packed).adapter == mk.trainable_parameters(model).adapter
    with pytest.raises(ValueError, match=r"expected tensors as the backbone's state.*_packed_params"):
        mk.save_adapter(packed, tmp_path / "packed")
    plain = quantize_dynamic(make(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"expected tensors as the backbone's state.*_packed_params"):
        mk.load_adapter(plain, tmp_path, ignore_backbone_hash=True)
    assert not hasattr(plain, "mosa")
    torch.testing.assert_close(mk.merge_and_unload(packed)(x), expected, rtol=1e-4, atol=1e-4)


def watched(module: nn.Module) -> list[int]:
    """Replaces its forward, as those do who want to see attention."""
    calls: list[int] = []
    forward = module.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = counting  # type: ignore[method-assign]
    return calls


def test_a_block_whose_forward_was_replaced_would_run_no_adapter() -> None:
    model = make()
    watched(model.blocks[1])
    with pytest.raises(UnknownModelError, match=r"one at blocks\.1 whose forward was replaced"):
        mk.inject_adapter(model, mk.MoSAConfig())
    del model.blocks[1].forward
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4))
    train_a_little(model)
    before, calls = model(images()), watched(model.blocks[1])
    assert torch.equal(model(images()), before)
    assert calls
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4), "second")
    assert torch.equal(set_adapter(model, "default")(images()), before)


@pytest.mark.parametrize(
    ("family", "options"), [(VIT, {"style": "lora"}), (family_of("eva02"), {"method": "vpt-deep"})], ids=["lora", "vpt"]
)
def test_attention_whose_forward_was_replaced_is_not_passed_by(family: Family, options: dict) -> None:
    model, x = make(family), images(family)
    calls = watched(model.blocks[1].attn)
    with pytest.raises(ValueError, match=r"forward .*was replaced, and would not run"):
        mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4, **options))
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4))
    model(x)
    assert calls

    model = mk.inject_adapter(make(family), mk.MoSAConfig(bottleneck=4, **options))
    calls = watched(model.blocks[1].attn)
    with pytest.raises(RuntimeError, match=r"expected timm's own forward of \w*Attention"):
        model(x)
    with disable_adapter(model):
        model(x)
    assert calls


def test_prompts_let_a_replaced_forward_of_attention_run() -> None:
    model = make()
    calls = watched(model.blocks[1].attn)
    mk.inject_adapter(model, mk.MoSAConfig(method="vpt-deep"))(images())
    assert calls


@torch.no_grad()
def test_low_rank_updates_in_the_weights_let_a_replaced_forward_run() -> None:
    model, x = mk.inject_adapter(make(), mk.MoSAConfig(style="lora", bottleneck=4)), images()
    train_a_little(model)
    before, calls = model(x), watched(model.blocks[0].attn)
    merge_adapter(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert calls
    unmerge_adapter(model)


@pytest.mark.parametrize("family", [SWIN, family_of("pvt")], ids=lambda family: family.name)
@torch.no_grad()
def test_of_the_parts_of_a_model_timm_can_keep_the_whole(family: Family) -> None:
    def features(**options: Any) -> nn.Module:
        return timm.create_model(family.name, features_only=True, out_indices=(0, 1), **family.kwargs, **options).eval()

    for around in (features(), nn.Sequential(features())):
        with pytest.raises(
            UnknownModelError, match=r"its parts alone; .* feature_cls='getter'\) keeps it, in \.model$"
        ):
            mk.inject_adapter(around, mk.MoSAConfig())
    net, x = features(feature_cls="getter"), images(family)
    plain = net(x)
    mk.inject_adapter(net.model, mk.MoSAConfig(bottleneck=4))
    train_a_little(net.model)
    adapted = net(x)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(adapted, plain, strict=True))
    mk.merge_and_unload(net)
    torch.testing.assert_close(net(x), adapted, rtol=1e-4, atol=1e-4)


def test_a_vit_as_features_has_its_model() -> None:
    net = timm.create_model(VIT.name, features_only=True, out_indices=(0, 1), **VIT.kwargs)
    mk.inject_adapter(net.model, mk.MoSAConfig(bottleneck=4))
    assert len(net.train()(images())) == 2
