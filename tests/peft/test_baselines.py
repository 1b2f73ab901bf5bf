"""The baselines: full fine-tuning, linear probing, BitFit (arXiv 2106.10199) and VPT (arXiv 2203.12119)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_models import SWIN, VIT, Family, family_of, images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.peft import (
    MoSAConfig,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
    trainable_parameters,
    two_pass,
)
from mosa_kernels.peft.backbone import describe_backbone
from mosa_kernels.peft.book import book_of
from mosa_kernels.peft.prompts import Prompts

METHODS = ("full", "linear", "bitfit", "vpt-shallow", "vpt-deep")
KEPT = ("full", "linear", "bitfit")


PROMPTED = [
    VIT,
    family_of("deit_tiny_distilled"),
    family_of("deit3"),
    family_of("vit_small_patch14_reg4_dinov2"),
    family_of("vit_small_patch16_dinov3"),
    family_of("eva02_tiny"),
    family_of("vit_base_patch16_siglip"),
]


def trained(method: str, family: Family = VIT, **options: object) -> nn.Module:
    config = MoSAConfig(method=method, **{"prompt_length": 3, **options})  # type: ignore[arg-type]
    model = inject_adapter(make(family), config)
    train_a_little(model)
    return model


@pytest.mark.parametrize("family", [VIT, SWIN, family_of("beit_"), family_of("eva02_tiny")], ids=lambda f: f.name)
def test_what_takes_gradients(family: Family) -> None:
    backbone = {name for name, _ in make(family, 0).named_parameters()}
    head = {name for name, _ in make(family).named_parameters()} - backbone
    biases = {name for name in backbone if name.rpartition(".")[2] in ("bias", "q_bias", "v_bias")}
    for method, expected in (("linear", set()), ("full", backbone), ("bitfit", biases)):
        model = inject_adapter(make(family), MoSAConfig(method=method)).train()
        with torch.no_grad():
            assert torch.equal(model(images(family)), make(family)(images(family))), "nothing has changed yet"
        model(images(family)).square().sum().backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        wanted = {name for name, p in model.named_parameters() if p.requires_grad}
        assert wanted == expected | head
        assert reached <= wanted
        assert len(reached) > len(wanted) * 0.9, "few have a gradient of zero, such as the keys' biases"


@pytest.mark.parametrize("family", PROMPTED, ids=lambda family: family.name)
@torch.no_grad()
def test_deep_prompts_take_part_in_their_block_and_go(family: Family) -> None:
    """Block by block, with the prompts in the attention of the tokens and nowhere else (VPT-deep)."""
    model, x = trained("vpt-deep", family), images(family)
    by_hand, prefix = make(family), model.num_prefix_tokens
    prompts = {path: each.weight for path, _, each in book_of(model).prompts("default")}
    assert list(prompts) == ["blocks.0", "blocks.1"]
    for path in prompts:
        block = by_hand.get_submodule(path)
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += 3
        forward = block.forward

        def prompted(tokens: Tensor, *args: Any, forward: Any = forward, path: str = path, **kwargs: Any) -> Tensor:
            new = prompts[path][None].repeat(len(tokens), 1, 1)
            longer = torch.cat([tokens[:, :prefix], new, tokens[:, prefix:]], 1)
            out = forward(longer, *args, **kwargs)
            return torch.cat([out[:, :prefix], out[:, prefix + 3 :]], 1)

        block.forward = prompted
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), make(family)(x), atol=1e-3)


@pytest.mark.parametrize("family", PROMPTED, ids=lambda family: family.name)
@torch.no_grad()
def test_shallow_prompts_stay_to_the_end(family: Family) -> None:
    """All blocks over the longer sequence; nothing else sees the prompts (VPT-shallow)."""
    model, x = trained("vpt-shallow", family), images(family)
    ((path, _, prompts),) = book_of(model).prompts("default")
    assert path == "blocks.0"
    by_hand, prefix = make(family), model.num_prefix_tokens
    for block in by_hand.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += 3
    first, last = by_hand.blocks[0], by_hand.blocks[-1]

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, *rest = args
        new = prompts.weight[None].repeat(len(tokens), 1, 1)
        return (torch.cat([tokens[:, :prefix], new, tokens[:, prefix:]], 1), *rest)

    first.register_forward_pre_hook(enter)
    last.register_forward_hook(lambda module, args, out: torch.cat([out[:, :prefix], out[:, prefix + 3 :]], 1))
    torch.testing.assert_close(model(x), by_hand(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), make(family)(x), atol=1e-3)


def test_prompts_are_drawn_from_the_seed_as_vpt_draws_them() -> None:
    def drawn(**options: object) -> list[Tensor]:
        model = inject_adapter(make(), MoSAConfig(method="vpt-deep", prompt_length=200, **options))  # type: ignore[arg-type]
        return [prompts.weight.detach() for _, _, prompts in book_of(model).prompts("default")]

    first, again, other = drawn(), drawn(), drawn(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    bound = math.sqrt(6 / (3 * 16 * 16 + 48))
    assert first[0].abs().max() <= bound
    assert abs(first[0].std().item() - bound / math.sqrt(3)) < 0.02 * bound
    assert len(drawn(layers=(1,))) == 1


def test_prompts_are_dropped_in_training_alone() -> None:
    model, x = trained("vpt-deep", dropout=0.5), images()
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(x), model(x))


def test_each_block_drops_as_many_of_its_prompts_as_it_is_told() -> None:
    def rates(method: str, **options: object) -> list[float]:
        return [each.dropout for each in trained(method, **options).modules() if isinstance(each, Prompts)]

    assert rates("vpt-deep", dropout="0:0.3") == [0, 0.3]
    assert rates("vpt-deep", dropout=[0.3], layers=(1,)) == [0.3]
    assert rates("vpt-shallow", dropout="0.2:0.3")[0] == 0.2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny", "attention works within windows of fixed size at layers.0.blocks.0"),
        ("swinv2_tiny", "windows of fixed size"),
        ("swinv2_cr_tiny", "windows of fixed size"),
        ("beit_base", "a bias for every pair of positions"),
        ("vit_relpos_base_patch16_224", "a bias for every pair of positions"),
        ("samvit", "a bias for every pair of positions"),
        ("hiera", "hiera.MaskUnitAttention at blocks.0 is not known to take more of them"),
        ("naflexvit", "expected num_prefix_tokens and patch_embed.patch_size"),
        ("vit_base_patch16_xp", "ParallelScalingBlock has no attention"),
    ],
)
@pytest.mark.parametrize("method", ["vpt-shallow", "vpt-deep"])
def test_models_without_a_place_for_tokens_are_refused(name: str, reason: str, method: str) -> None:
    model = make(family_of(name))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"method: '{method}' adds tokens, which .* does not take: .*{reason}"):
        inject_adapter(model, MoSAConfig(method=method))
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_baseline_is_one_more_adapter(method: str, tmp_path: Path) -> None:
    model, x = make(), images()
    before, clean, plain = model(x), describe_backbone(model), {k: v.clone() for k, v in model.state_dict().items()}
    inject_adapter(model, MoSAConfig(method=method, prompt_length=3), "baseline", num_classes=4)
    train_a_little(model, "baseline")
    model.head.weight.add_(1)
    output = model(x)
    assert output.shape == (2, 4)
    with disable_adapter(model):
        assert torch.equal(model(x), before)
        assert describe_backbone(model) == clean
    inject_adapter(model, MoSAConfig(bottleneck=4), "adapter")
    assert torch.equal(model(x), before), "a fresh adapter on the backbone as it was"
    inject_adapter(model, MoSAConfig(method=method, prompt_length=2, seed=1), "again")
    train_a_little(model, "again", seed=8)
    assert torch.equal(set_adapter(model, "baseline")(x), output)
    assert describe_backbone(model) == clean
    trainable = trainable_parameters(model)
    assert trainable.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable.backbone == sum(p.numel() for p in make(num_classes=0).parameters())
    save_adapter(model, tmp_path / "active")
    set_adapter(model, "again")
    save_adapter(model, tmp_path / "inactive", "baseline")
    for directory in ("active", "inactive"):
        backbone = make()
        backbone.reset_classifier(4)
        other = load_adapter(backbone.eval(), tmp_path / directory)
        assert torch.equal(other(x), output)
        mixed = load_adapter(inject_adapter(make(), MoSAConfig(method="full")), tmp_path / directory, new_head=True)
        assert torch.equal(mixed(x), output)
    for name in ("again", "adapter", "baseline"):
        delete_adapter(model, name)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
@torch.no_grad()
def test_merging_leaves_what_was_trained_in_plain_modules(method: str, family: Family) -> None:
    model, x = trained(method, family), images(family)
    output = model(x)
    inject_adapter(model, MoSAConfig(bottleneck=4), "other")
    merge_and_unload(model, adapter_name="default")
    assert torch.equal(model(x), output)
    assert [type(module) for module in model.modules()] == [type(module) for module in make(family).modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_prompts_do_not_merge() -> None:
    model = trained("vpt-deep")
    with pytest.raises(ValueError, match="method: 'vpt-deep' adds tokens, which do not merge into weights"):
        merge_and_unload(model)
    with pytest.raises(ValueError, match="of style 'lora', which folds into weights, got 'vpt-deep'"):
        merge_adapter(model)
    assert model(images()).shape == (2, 10)


@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_moves_what_trains_and_nothing_else(method: str) -> None:
    model, x = trained(method).train(), images()
    clean = describe_backbone(model)["sha256"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"head.weight", "head.bias"} <= moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(moved) > 2 or method == "linear"
    assert describe_backbone(model)["sha256"] == clean


@pytest.mark.parametrize("method", METHODS)
def test_two_passes_agree_where_nothing_is_drawn(method: str) -> None:
    out = two_pass(trained(method).train(), images())
    torch.testing.assert_close(out.logits1, out.logits2)
    assert len(out.features1) == 2
    out.logits1.sum().backward()


def test_prompts_under_torch_compile() -> None:
    torch._dynamo.reset()
    family = family_of("vit_small_patch16_dinov3")
    model, x = trained("vpt-deep", family).train(), images(family)
    model.set_grad_checkpointing(True)
    results = []
    for runner in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = runner(x)
        out.sum().backward()
        results.append([out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_shallow_prompts_do_not_cross_stages() -> None:
    model = make(VIT)
    model.blocks[1].norm1 = nn.LayerNorm(47)
    with pytest.raises(ValueError, match=r"'vpt-shallow' carries its prompts through all blocks, which stages of .*47"):
        inject_adapter(model, MoSAConfig(method="vpt-shallow"))


def test_quantised_weights_do_not_train() -> None:
    model = make()
    codes = nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)
    model.blocks[0].attn.proj.weight = codes
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"method: 'full' trains blocks\.0\.attn\.proj\.weight, .* torch\.int8"):
        inject_adapter(model, MoSAConfig(method="full"))
    assert list(model.state_dict()) == keys
    inject_adapter(model, MoSAConfig(method="bitfit"))
