"""Both modes of the two passes of Eq. 6 are the same function, and leave nothing behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import timm
import torch
from timm_models import FAMILIES, SWIN, VIT, Family, family_of, images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.nn.sampler import Draw, ExpertSampler
from mosa_kernels.nn.streams import _MARK, derived_seed
from mosa_kernels.peft import MoSAConfig, TwoPassOutput, disable_adapter, inject_adapter, two_pass
from mosa_kernels.peft.book import book_of

OPTIONS = [
    {},
    {"expert_per": "batch"},
    {"anchored": True},
    {"anchored": True, "expert_per": "batch", "sparse": "both"},
    {"mode": "pruned"},
    {"mode": "dense"},
    {"style": "houlsby"},
    {"style": "lora", "lora_targets": ("q", "v", "proj"), "sparse": "both"},
]


def trained(family: Family = VIT, **options: object) -> nn.Module:
    model = inject_adapter(make(family), MoSAConfig(**{"bottleneck": 4, "dropout": 0.3, **options}))  # type: ignore[arg-type]
    train_a_little(model)
    return model.train()


def loss_of(out: TwoPassOutput) -> Tensor:
    consistency = (out.logits1.log_softmax(-1) - out.logits2.log_softmax(-1)).square().sum()
    alignment = sum((a - b).square().mean() for a, b in zip(out.features1, out.features2, strict=True))
    return out.logits1.logsumexp(-1).sum() + consistency + alignment


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def tensors(out: TwoPassOutput) -> list[Tensor]:
    return [out.logits1, out.logits2, *out.features1, *out.features2]


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_modes_agree_also_when_blocks_are_computed_again(family: Family, options: dict) -> None:
    model, x = trained(family, **options), images(family, 3)
    results = []
    for mode in ("batched", "sequential"):
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            model.zero_grad()
            torch.manual_seed(7)
            out = two_pass(model, x, mode)
            following = torch.rand(3)
            model(x)  # what runs before the backward pass must not matter
            two_pass(model, x, "sequential")
            loss_of(out).backward()
            results.append([*tensors(out), following, *gradients(model)])
    assert not torch.allclose(results[0][0], results[0][1]), "the passes differ"
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_outputs_differentiated_later_keep_their_draws() -> None:
    """Gradient accumulation with a postponed backward pass, under activation checkpointing."""
    model, x = trained(), images()
    expected = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        total = loss_of(two_pass(model, x)) + loss_of(two_pass(model, 2 * x, "sequential")) + model(x).sum()
        total.backward()
        expected.append(gradients(model))
    for a, b in zip(*expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_draws_are_fresh_and_seeded() -> None:
    model, x = trained(dropout=0.0), images(batch=16)
    torch.manual_seed(0)
    first, second = two_pass(model, x), two_pass(model, x)
    torch.manual_seed(0)
    again = two_pass(model, x)
    assert torch.equal(first.logits1, again.logits1)
    assert not torch.equal(first.logits1, second.logits1)
    assert not torch.equal(first.logits1, first.logits2)


def test_the_default_device_of_whatever_else_runs_changes_no_draw() -> None:
    model, x = trained(), images()
    torch.manual_seed(0)
    expected = tensors(two_pass(model, x))
    torch.manual_seed(0)
    with torch.device("meta"):
        found = tensors(two_pass(model, x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_adapters_draw_independently_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    draw_passes = ExpertSampler.draw_passes

    def spy(self: ExpertSampler, *arguments: object) -> Draw:
        draw = draw_passes(self, *arguments)  # type: ignore[arg-type]
        assert isinstance(draw.expert, Tensor)
        drawn.append(draw.expert)
        return draw

    monkeypatch.setattr(ExpertSampler, "draw_passes", spy)
    two_pass(trained(), images(batch=64))
    counts = torch.zeros(4, 4)
    counts.index_put_((drawn[0], drawn[1]), torch.ones(128), accumulate=True)
    assert counts.min() >= 1, "every pair of experts of the two layers occurs"
    assert not torch.equal(drawn[0][:64], drawn[0][64:])


@torch.no_grad()
def test_an_anchored_first_pass_is_the_merged_adapter() -> None:
    model, x = trained(anchored=True, dropout=0.0), images()
    out = two_pass(model, x)
    merged = model.eval()(x)
    torch.testing.assert_close(out.logits1, merged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out.logits2, merged, atol=1e-3)


@torch.no_grad()
def test_features_are_the_outputs_of_the_blocks() -> None:
    model, x = trained(mode="dense", dropout=0.0, layers=(1,)), images()
    out = two_pass(model, x)
    _, blocks = model.forward_intermediates(x, indices=[0, 1], norm=False, output_fmt="NLC", return_prefix_tokens=True)
    assert (out.blocks, out.depth) == ((0, 1), 2)
    for feature, (spatial, prefix) in zip(out.features2, blocks, strict=True):
        torch.testing.assert_close(feature, torch.cat([prefix, spatial], 1))


@pytest.mark.parametrize("name", ["cait", "hiera", "mvitv2"])
@torch.no_grad()
def test_features_are_tokens_also_where_blocks_change_their_number_or_hand_on_more(name: str) -> None:
    family = family_of(name)
    model, seen = trained(family, mode="dense", dropout=0.0), []
    for path in book_of(model).blocks:
        model.get_submodule(path).register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    out = two_pass(model, images(family), "sequential")
    assert len({feature.shape for feature in out.features1}) == 2
    assert all(torch.equal(a, b) for a, b in zip(out.features1 + out.features2, seen, strict=True))


def test_only_the_features_asked_for_are_kept() -> None:
    model, x = trained(), images()
    none = two_pass(model, x, features=False)
    assert (none.features1, none.features2, none.blocks) == ([], [], ())
    last = two_pass(model, x, features=[-1])
    assert (len(last.features1), last.blocks) == (1, (1,))
    assert two_pass(model, x, features=[1, 0]).blocks == (0, 1)
    assert two_pass(model, x, features=[-2]).blocks == (0,)
    for features in (1, None):
        with pytest.raises(TypeError, match="features: expected True, False or block indices, got"):
            two_pass(model, x, features=features)  # type: ignore[arg-type]
    for features in ([2], [-3], [True], [0.5]):
        with pytest.raises(ValueError, match="features: expected"):
            two_pass(model, x, features=features)  # type: ignore[arg-type]


def marked() -> bool:
    return torch.initial_seed() >> 32 == _MARK


def in_threads(*runs: Callable[[], object]) -> None:
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_take_turns_to_mark_the_generator() -> None:
    """Or one would save the other's mark, and put it back when that has long gone."""

    def repeated(model: nn.Module) -> None:
        for _ in range(20):
            two_pass(model, images())

    in_threads(*(partial(repeated, trained()) for _ in range(3)))
    assert not marked()


@pytest.mark.parametrize("options", [{"expert_per": "batch"}, {}], ids=str)
def test_other_threads_draw_as_ever(options: dict) -> None:
    """Three images, which two passes could not share, and one draw a batch."""
    model, other, seen = trained(), trained(**options), []
    sampler = next(module for module in other.modules() if isinstance(module, ExpertSampler))
    sampler.register_forward_hook(lambda *found: seen.append(found[-1].expert))

    def meanwhile(*_: object) -> None:
        assert marked()
        in_threads(lambda: other(images()[:1].repeat(3, 1, 1, 1)))

    hook = model.norm.register_forward_hook(meanwhile)
    two_pass(model, images())
    hook.remove()
    assert [expert.shape for expert in seen] == [() if options else (3,)]


def test_nothing_is_left_behind() -> None:
    model, x = trained(), images()
    state = torch.get_rng_state()
    two_pass(model, x)
    advanced = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.randint(2**30, ())
    assert torch.equal(torch.get_rng_state(), advanced), "the global stream advances by one number"
    assert not marked()

    def fails(*_: object) -> None:
        raise KeyError

    hook = model.norm.register_forward_hook(fails)
    with pytest.raises(KeyError):
        two_pass(model, x)
    hook.remove()
    assert not marked()
    for module in model.modules():
        assert getattr(module, "plan", None) is None
        assert getattr(module, "record", None) is None


def test_what_it_refuses() -> None:
    model, x = trained(), images()
    with pytest.raises(ValueError, match="mode: expected one of batched, sequential, got 'both'"):
        two_pass(model, x, "both")
    with pytest.raises(TypeError, match="images: expected a tensor"):
        two_pass(model, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected one with adapters"):
        two_pass(make().train(), x)
    with pytest.raises(RuntimeError, match="expected the model in training mode"):
        two_pass(model.eval(), x)
    with disable_adapter(model.train()), pytest.raises(ValueError, match="expected an active adapter"):
        two_pass(model, x)


ARGUMENTS_BY_NAME = ("vit_small_patch16_dinov3", "vit_relpos", "beit", "eva02", "naflexvit")


@pytest.fixture
def reentrant() -> Iterator[None]:
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.usefixtures("reentrant")
def test_reentrant_checkpointing_is_refused() -> None:
    model, x = trained(), images()
    two_pass(model, x)
    model.set_grad_checkpointing(True)
    for features in (True, False):
        with pytest.raises(RuntimeError, match=r"without reentry, got the reentrant kind.*set_reentrant_ckpt\(False\)"):
            two_pass(model, x, features=features)
    with torch.no_grad():
        two_pass(model, x)


@pytest.mark.usefixtures("reentrant")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_reentrant_checkpointing_loses_no_gradient_of_a_plain_pass(family: Family) -> None:
    model, x = copy.deepcopy(trained(family, dropout=0.0)), images(family)
    if family.name.startswith(ARGUMENTS_BY_NAME):
        model.set_grad_checkpointing(True)
        with pytest.raises(ValueError, match="Unexpected keyword arguments"):  # PyTorch's own
            model(x)
        return
    if family.name.startswith(("convit", "twins")):
        with pytest.raises(AssertionError, match="gradient checkpointing not supported"):  # timm's own
            model.set_grad_checkpointing(True)
        return
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(5)
        model(x).logsumexp(-1).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        found.append(gradients(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_seeds_depend_on_every_number() -> None:
    seeds = {derived_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert len({seed & 0xFFFFFFFF for seed in seeds}) == 512, "the CPU's generator sees the lower half alone"
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_empty_batch(options: dict, mode: str) -> None:
    model = trained(**options)
    assert model(images()[:0]).shape == (0, 10)
    out = two_pass(model, images()[:0], mode)
    assert {len(each) for each in tensors(out)} == {0}
    loss_of(out).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shapes_on_the_meta_device(options: dict, mode: str) -> None:
    expected = tensors(two_pass(trained(**options), images(), mode))
    found = tensors(two_pass(trained(**options).to("meta"), images().to("meta"), mode))
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert {each.device.type for each in found} == {"meta"}


NAFLEX = next(family for family in FAMILIES if family.name.startswith("naflexvit"))


def patches(batch: int) -> dict[str, object]:
    """Images as patches, which differ in how many they are."""
    generator = torch.Generator().manual_seed(4)
    coordinates = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(batch, 4, 2)
    valid = torch.arange(4) < torch.tensor([4, 2, 3])[:batch, None]
    return {
        "patches": torch.randn(batch, 4, 16 * 16 * 3, generator=generator),
        "patch_coord": coordinates,
        "patch_valid": valid,
        "attn_mask": None,
    }


def test_images_of_several_sizes_as_patches() -> None:
    model, x = trained(NAFLEX), patches(3)
    results = []
    for mode in ("batched", "sequential"):
        torch.manual_seed(7)
        model.zero_grad()
        out = two_pass(model, x, mode)
        loss_of(out).backward()
        results.append([*tensors(out), *gradients(model)])
    assert not torch.allclose(results[0][0], results[0][1]), "the passes differ"
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_patches_that_do_not_fit_together() -> None:
    model, x = trained(NAFLEX), patches(3)
    with pytest.raises(ValueError, match=r"images\['patch_valid'\]: expected 3 rows, as images\['patches'\] .* got 2"):
        two_pass(model, {**x, "patch_valid": patches(2)["patch_valid"]})
    for wrong in ({}, {"patches": None}, [1], None):
        with pytest.raises(TypeError, match=r"images: expected a tensor .* or a mapping"):
            two_pass(model, wrong)  # type: ignore[arg-type]
