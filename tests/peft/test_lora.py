"""Where low-rank updates sit in each kind of attention, and how they get into the frozen weights and out again."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm_models import FAMILIES, SWIN, VIT, Family, family_of, images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.nn.lora import FusedMoSALoRA
from mosa_kernels.nn.sampler import Draw
from mosa_kernels.peft import (
    BackboneMismatchError,
    MoSAConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    two_pass,
    unmerge_adapter,
)
from mosa_kernels.peft.backbone import describe_backbone
from mosa_kernels.peft.book import book_of
from mosa_kernels.peft.placement import find_blocks

TAKE_LORA = [family for family in FAMILIES if "lora" in family.styles]
SPLIT = next(family for family in FAMILIES if family.name.startswith("eva02_tiny"))
SEPARATE_BIAS = next(family for family in FAMILIES if family.name == "beit_base_patch16_224")
KINDS = [VIT, SPLIT, SEPARATE_BIAS, SWIN, next(f for f in FAMILIES if f.name.startswith("swinv2_tiny"))]
named = pytest.mark.parametrize("family", KINDS, ids=lambda family: family.name)


def updated(family: Family = VIT, **options: object) -> nn.Module:
    model = inject_adapter(make(family), MoSAConfig(style="lora", **{"bottleneck": 4, **options}))  # type: ignore[arg-type]
    train_a_little(model)
    return model


def updates(model: nn.Module) -> list[tuple[str, str, FusedMoSALoRA]]:
    found = list(book_of(model).adapters("default"))
    assert all(isinstance(adapter, FusedMoSALoRA) for _, _, adapter in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("family", TAKE_LORA, ids=lambda family: family.name)
@pytest.mark.parametrize("target", ["q", "k", "v", "proj"])
@torch.no_grad()
def test_an_update_is_a_change_of_the_rows_that_the_target_has(family: Family, target: str) -> None:
    """In float64, against the same backbone whose weight was changed by hand."""
    model, x = make(family).double(), images(family).double()
    inject_adapter(model, MoSAConfig(style="lora", mode="dense", bottleneck=3, lora_targets=(target,)))
    train_a_little(model)
    by_hand = make(family).double()
    for path, site, adapter in updates(model):
        assert site == target
        attention = by_hand.get_submodule(path).attn
        change = adapter.up.weight @ adapter.down.weight
        rows = change.shape[0]
        if target == "proj":
            layer, first = attention.proj, 0
        elif getattr(attention, "qkv", None) is not None:
            layer, first = attention.qkv, "qkv".index(target) * rows
        elif hasattr(attention, "kv"):
            layer, first = (attention.q, 0) if target == "q" else (attention.kv, "kv".index(target) * rows)
        else:
            layer, first = getattr(attention, target if hasattr(attention, target) else f"{target}_proj"), 0
        layer.weight[first : first + rows] += change
    assert not torch.allclose(model(x), make(family).double()(x), atol=1e-6)
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "family", [VIT, SWIN, *map(family_of, ("cait", "sam2_hiera", "samvit"))], ids=lambda family: family.name
)
def test_an_expert_is_drawn_for_an_image_not_for_a_window(family: Family) -> None:
    model = updated(family, sparse="both").train()
    x = images(family, 1).expand(3, -1, -1, -1)
    for _, _, adapter in updates(model):
        adapter.sampler.plan = Draw(torch.tensor([0, 2, 0]), None)
    out = model(x)
    torch.testing.assert_close(out[0], out[2], rtol=1e-5, atol=1e-6)
    for image, expert in ((0, 0), (1, 2)):
        for _, _, adapter in updates(model):
            adapter.sampler.plan = Draw(expert, None)
        torch.testing.assert_close(out[image], model(x[:1])[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out[0], out[1], atol=1e-4)
    for _, _, adapter in updates(model):
        adapter.sampler.plan = None
    assert two_pass(model, images(family, 3)).logits1.shape == (3, 10)


@pytest.mark.parametrize("attention", ["wide", "grouped"])
@torch.no_grad()
def test_attention_whose_width_is_not_the_models(attention: str) -> None:
    """Heads of another size, and fewer keys and values than queries."""
    kind, option = (Attention, "attn_head_dim") if attention == "wide" else (AttentionRope, "num_kv_heads")
    if option not in signature(kind).parameters:
        pytest.skip(f"timm {timm.__version__} has no {option}")

    def changed() -> nn.Module:
        model = make()
        torch.manual_seed(3)
        for block in model.blocks:
            if attention == "wide":
                block.attn = Attention(48, 3, attn_head_dim=20, qkv_bias=True)
            else:
                block.attn = AttentionRope(48, 6, qkv_fused=False, num_kv_heads=3, num_prefix_tokens=1)
        return model.eval()

    model, x = changed(), images()
    before = model(x)
    inject_adapter(model, MoSAConfig(style="lora", bottleneck=4, lora_targets=("q", "k", "v", "proj")))
    assert torch.equal(model(x), before)
    train_a_little(model)
    widths = {site: (adapter.dim, adapter.out_dim) for _, site, adapter in updates(model)}
    expected = {"q": (48, 60), "k": (48, 60), "v": (48, 60), "proj": (60, 48)}
    if attention == "grouped":
        expected = {"q": (48, 48), "k": (48, 24), "v": (48, 24), "proj": (48, 48)}
    assert widths == expected
    trained = model(x)
    assert not torch.allclose(trained, before, atol=1e-3)
    torch.testing.assert_close(merge_and_unload(model)(x), trained, rtol=1e-5, atol=1e-5)


@named
@pytest.mark.parametrize("rule", ["mean", "jigsaw"])
@torch.no_grad()
def test_merging_changes_nothing_and_unmerging_is_exact(family: Family, rule: str) -> None:
    model, x = updated(family, merge_rule=rule, lora_targets=("q", "k", "v", "proj")), images(family)
    before, weights = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = merge_adapter(model)
    assert (loss.dtype, loss.relative) == (torch.float32, 0.0)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    merged = model(x)
    parameters = [parameter for _, _, adapter in updates(model) for parameter in adapter.parameters()]
    values = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.fill_(float("nan"))
    assert torch.equal(model(x), merged), "no adapter runs"
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    assert unmerge_adapter(model) is model
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), before)


@named
@torch.no_grad()
def test_what_is_left_after_merging_is_timms_own_model(family: Family) -> None:
    model, x, plain = updated(family), images(family), make(family)
    before = model(x)
    types = [type(module) for module in plain.modules()]
    trainable = [parameter.requires_grad for parameter in plain.parameters()]
    assert merge_and_unload(model) is model
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_rule_asked_for_decides() -> None:
    one, other, x = updated(), updated(merge_rule="jigsaw"), images()
    merge_adapter(one, "jigsaw")
    torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(unmerge_adapter(one)(x), other(x), atol=1e-3)
    torch.testing.assert_close(merge_and_unload(one, "jigsaw")(x), other(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_says_what_was_lost_and_comes_back_exactly() -> None:
    model = updated().bfloat16()
    for _, _, adapter in updates(model):
        adapter.up.weight.mul_(1e-4)  # updates far below the last bit of most weights
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.warns(
        UserWarning, match=r"merged into torch.bfloat16: rounding loses .* % of the update of blocks\.\d"
    ) as merging:
        loss = merge_adapter(model)
    exact = [adapter.delta() for _, site, adapter in updates(model) if site == "q"]
    now = model.blocks[0].attn.qkv.weight[:48].float()
    lost = weights_of(weights, model)[:48].float() + exact[0] - now
    assert loss.relative >= lost.norm() / exact[0].norm() * 0.99
    assert 0.5 < loss.relative < 2
    assert loss.absolute >= lost.abs().max() * 0.99
    unmerge_adapter(model)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    with pytest.warns(UserWarning, match="merged into torch.bfloat16") as unloading:
        merge_and_unload(model)
    assert {warning.filename for warning in (*merging, *unloading)} == {__file__}


def weights_of(values: list[Tensor], model: nn.Module) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    return values[names.index("blocks.0.attn.qkv.weight")]


@torch.no_grad()
def test_rounding_is_of_the_sum_in_float32() -> None:
    """Updates one after the other in half precision would lose more (PEFT #1977)."""
    model = updated(mode="dense").bfloat16()
    before = model.blocks[1].attn.qkv.weight.clone()
    with pytest.warns(UserWarning, match="merged into"):
        merge_adapter(model)
    for start, site in ((0, "q"), (96, "v")):
        adapter = next(a for path, s, a in updates(model) if (path, s) == ("blocks.1", site))
        rows = slice(start, start + 48)
        exact = before[rows].float() + adapter.up.weight.float() @ adapter.down.weight.float()
        assert torch.equal(model.blocks[1].attn.qkv.weight[rows], exact.bfloat16())
    assert torch.equal(model.blocks[1].attn.qkv.weight[48:96], before[48:96])


def test_a_merged_model_is_left_alone(tmp_path: Path) -> None:
    model, x = updated(), images()
    inject_adapter(model, MoSAConfig(bottleneck=4), "other")
    with pytest.raises(
        ValueError, match=r"expected an active adapter of style 'lora', which folds .* got 'adaptformer'"
    ):
        merge_adapter(model)
    with pytest.raises(ValueError, match="expected one whose adapter is merged"):
        unmerge_adapter(model)
    set_adapter(model, "default")
    clean, here = describe_backbone(model), [parameter.requires_grad for parameter in model.parameters()]
    merge_adapter(model)
    assert describe_backbone(model) == clean, "the hash is that of the backbone"
    save_adapter(model, tmp_path)
    for act in (
        lambda: merge_adapter(model),
        lambda: set_adapter(model, "other"),
        lambda: inject_adapter(model, MoSAConfig(), "third"),
        lambda: delete_adapter(model, "other"),
        lambda: merge_and_unload(model),
        lambda: load_adapter(model, tmp_path),
        lambda: two_pass(model.train(), x),
        lambda: disable_adapter(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="'default' is merged into the frozen weights; call unmerge_adapter first"):
            act()
    with pytest.raises(RuntimeError, match="train after unmerge_adapter"):
        model.train()(x)
    unmerge_adapter(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == here
    model(x).sum().backward()
    fresh = load_adapter(make(), tmp_path)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    with disable_adapter(model), pytest.raises(ValueError, match="expected an active adapter"):
        merge_adapter(model)


@named
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(family: Family, tmp_path: Path) -> None:
    model, x = updated(family, lora_targets=("v", "proj"), num_experts=3), images(family)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())["config"]
    assert (config["style"], config["lora_targets"]) == ("lora", ["v", "proj"])
    other = load_adapter(make(family), tmp_path)
    assert torch.equal(other(x), model(x))
    assert book_of(other).configs["default"] == book_of(model).configs["default"]


@named
@torch.no_grad()
def test_styles_share_a_backbone(family: Family) -> None:
    model, x = make(family), images(family)
    before = model(x)
    inject_adapter(model, MoSAConfig(bottleneck=4), "ffn")
    inject_adapter(model, MoSAConfig(style="lora", bottleneck=4), "attention")
    for name in ("ffn", "attention"):
        train_a_little(model, name)
    outputs = {name: set_adapter(model, name)(x) for name in ("ffn", "attention")}
    assert not torch.allclose(outputs["ffn"], outputs["attention"], atol=1e-3)
    with disable_adapter(model):
        assert torch.equal(model(x), before)
    assert torch.equal(set_adapter(model, "ffn")(x), outputs["ffn"])
    delete_adapter(model, "ffn")
    assert torch.equal(model(x), outputs["attention"])


@pytest.mark.parametrize("mode", ["dense", "pruned", "mosa"])
def test_gradients_reach_the_updates_and_the_head_alone(mode: str) -> None:
    model = updated(mode=mode).train()
    model(images()).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefix = "blocks.{}.mosa.default.{}.{}.weight"
    places = {prefix.format(b, s, p) for b in range(2) for s in "qv" for p in ("down", "up")}
    assert reached == places | {"head.weight", "head.bias"}


def test_hooks_on_attention_still_run() -> None:
    model, x, seen = updated(), images(), []
    attention = model.blocks[0].attn
    handles = [
        attention.register_forward_pre_hook(lambda module, args: seen.append(("pre", module is attention))),
        attention.register_forward_hook(lambda module, args, out: seen.append(("post", out.shape[-1]))),
        attention.qkv.register_forward_hook(lambda module, args, out: seen.append(("qkv", out.shape[-1]))),
        model.blocks[1].attn.register_forward_hook(lambda module, args, kwargs, out: out * 0, with_kwargs=True),
    ]
    changed = model(x)
    assert seen == [("pre", True), ("qkv", 144), ("post", 48)]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(changed, model(x))


def test_backward_hooks_on_attention_still_run() -> None:
    model, x, seen = updated().train(), images(), []
    attention = model.blocks[1].attn
    attention.register_full_backward_pre_hook(lambda module, grads: seen.append((module is attention, len(grads))))
    attention.register_full_backward_hook(
        lambda module, into, out: seen.append((module is attention, into[0].shape == out[0].shape))
    )
    model(x).sum().backward()
    assert seen == [(True, 1), (True, True)]

    for parameter in model.parameters():
        parameter.grad = None
    attention.register_full_backward_pre_hook(lambda module, grads: (torch.zeros_like(grads[0]),))
    model(x).sum().backward()
    assert all(not parameter.grad.any() for parameter in attention.parameters() if parameter.grad is not None)
    assert not model.blocks[1].mosa.default.q.up.weight.grad.any()
    assert model.blocks[0].mosa.default.q.up.weight.grad.any()


@pytest.mark.parametrize("family", [SEPARATE_BIAS, KINDS[-1]], ids=lambda family: family.name)
@torch.no_grad()
def test_biases_that_timm_adds_after_the_product(family: Family) -> None:
    model, x = make(family), images(family)
    for block in find_blocks(model):
        block.block.attn.qkv_bias_separate = True
    expected = model(x)
    torch.testing.assert_close(inject_adapter(model, MoSAConfig(style="lora"))(x), expected)


@pytest.mark.parametrize("family", [VIT, SEPARATE_BIAS, SPLIT], ids=lambda family: family.name)
@torch.no_grad()
def test_autocast(family: Family) -> None:
    model, x = updated(family), images(family)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        merged = merge_and_unload(model)(x)
    assert (found - expected).norm() / expected.norm() < 0.1
    assert (found.float() - merged.float()).norm() / expected.norm() < 0.1


def test_a_projection_of_another_class_is_named_in_full() -> None:
    class Linear(nn.Module):
        pass

    model = make()
    model.blocks[0].attn.qkv = Linear()
    with pytest.raises(
        ValueError, match=r"expected a torch\.nn\.Linear as qkv, got tests\.peft\.test_lora\..*Linear; expected"
    ):
        inject_adapter(model, MoSAConfig(style="lora"))


def test_attention_of_an_unknown_class_is_refused_by_name() -> None:
    class Focused(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.qkv, self.proj = inner.qkv, inner.proj

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.qkv(x)[..., :48])

    model = make()
    model.blocks[1].attn = Focused(model.blocks[1].attn)
    keys = list(model.state_dict())
    with pytest.raises(
        ValueError, match=r"style: 'lora' does not reach 'q' of Block at blocks.1: .*Focused are not known"
    ):
        inject_adapter(model, MoSAConfig(style="lora"))
    assert list(model.state_dict()) == keys
    inject_adapter(model, MoSAConfig(style="lora", layers=(0,)))


class Coded(nn.Linear):
    """As quantised layers are: codes in the place of the weight, of 8 bits or packed, and further state."""

    def __init__(self, layer: nn.Linear, packed: bool) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.step = float(layer.weight.detach().abs().max()) / 127
        codes = (layer.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1) if packed else codes, requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.step * self.weight.view(self.out_features, -1), self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.step"] = torch.tensor(self.step)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_quantised_weights_take_no_update_and_their_adapter_merges_elsewhere(packed: bool, tmp_path: Path) -> None:
    model, x = make(), images()
    for block in model.blocks:
        block.attn.qkv = Coded(block.attn.qkv, packed)
    inject_adapter(model, MoSAConfig(style="lora", bottleneck=4))
    train_a_little(model)
    before = model(x)
    for merge in (merge_adapter, merge_and_unload):
        with pytest.raises(ValueError, match=r"expected blocks\.0\.attn\.qkv\.weight in floating point, .* of a Coded"):
            merge(model)
        assert torch.equal(model(x), before)
    save_adapter(model, tmp_path)
    with pytest.raises(BackboneMismatchError, match="the names and shapes agree"):
        load_adapter(make(), tmp_path)
    whole = load_adapter(make(), tmp_path, ignore_backbone_hash=True)
    torch.testing.assert_close(merge_and_unload(whole)(x), before, rtol=0.05, atol=0.05)
