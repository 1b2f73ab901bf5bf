"""Whole models: every variant trains, and one that computes something else has no time."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mosa_kernels.backends import cpu
from mosa_kernels.bench.dense_copies import DenseCopiesAdapter
from mosa_kernels.bench.model import admit_variant, measure_model, settings
from mosa_kernels.bench.model_variants import BACKBONE, TRAINING, Setting, Shop, state_bytes
from mosa_kernels.nn.adapter import FusedMoSAAdapter

CPU = torch.device("cpu")


def test_rows_of_a_small_model() -> None:
    (setting,) = settings("smoke", "cpu")
    record = measure_model(setting, CPU, rounds=3, seconds=0.1)
    rows = {row["variant"]: row for row in (*record["training"], *record["inference"])}
    assert {row["status"] for name, row in rows.items() if "PEFT" not in name} == {"ok"}, rows
    training = {row["variant"]: row for row in record["training"] if row["status"] == "ok"}
    for row in training.values():
        assert row["images_per_second"] == pytest.approx(4 / row["ms"]["median"] * 1e3)
        assert 0 <= row["share_in_adapters"] < 1
        assert row["saved_bytes"] > 0
    fused, copies, alone = (
        training[name] for name in ("MoSA cpu, expert per batch", "MoSA N copies, expert per batch", BACKBONE)
    )
    assert {name for name, row in rows.items() if row["ours"]} == {
        *(f"MoSA cpu, expert per {per}" for per in ("sample", "batch", "sample, alignment")),
        *("AdaptFormer cpu", "unmerged, cpu"),
    }
    assert copies["state_bytes"] > fused["state_bytes"] > alone["state_bytes"]
    assert training["MoSA eager, expert per sample"]["saved_bytes"] > fused["saved_bytes"]


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_other_models_and_a_wrong_variant(model: str) -> None:
    options = (("depth", 1), ("img_size", 32)) if "vit" in model else (("depths", (1, 1, 1, 1)),)
    shop = Shop(Setting(model, 1, 4, 2, options), CPU)
    variants = {variant.name: variant for variant in shop.variants() if variant.part == TRAINING}
    row, made = admit_variant(shop, variants["MoSA cpu, expert per sample"])
    assert row["status"] == "ok", row
    assert made is not None
    logits = made.logits
    assert logits is not None
    wrong = variants["MoSA cpu, expert per sample"]._replace(
        build=lambda: made._replace(logits=lambda: logits() * 1.001)
    )
    row, refused = admit_variant(shop, wrong)
    assert row["status"] == "red"
    assert "error gate red: logits" in row["reason"]
    assert refused is None


def test_chosen_providers_alone_run_adapters() -> None:
    setting = Setting("vit_tiny_patch16_224", 1, 4, 2, (("depth", 1), ("img_size", 32)))
    made = measure_model(setting, CPU, rounds=3, seconds=0.1, providers=("eager", "N copies"))
    names = {row["variant"] for row in made["training"]}
    assert {"MoSA eager, expert per sample", "MoSA N copies, expert per batch", BACKBONE} <= names
    assert not any("cpu" in name for name in names)


def test_variants_share_what_is_frozen_and_leave_it_as_it_is() -> None:
    shop = Shop(Setting("vit_tiny_patch16_224", 1, 4, 2, (("depth", 1), ("img_size", 32))), CPU)
    before = {name: tensor.clone() for name, tensor in shop.backbone.state_dict().items()}
    frozen = {p.data_ptr() for name, p in shop.backbone.named_parameters() if not name.startswith("head.")}
    heads: set[int] = set()
    for variant in shop.variants():
        if variant.reason is None:
            made = variant.build()
            made.run()
            if variant.part == TRAINING:
                held = {tensor.data_ptr() for tensor in made.own}
                assert frozen < held, variant.name
                heads |= held - frozen
    changed = [name for name, tensor in shop.backbone.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == []
    assert not any(p.requires_grad for p in shop.backbone.parameters() if p.data_ptr() in frozen)
    assert shop.backbone.head.weight.data_ptr() not in heads


def test_a_model_is_gone_once_it_is_measured() -> None:
    shop = Shop(Setting("vit_tiny_patch16_224", 1, 4, 2, (("depth", 1), ("img_size", 32))), CPU)
    shop.expected(True)
    gone = weakref.ref(shop)
    del shop
    gc.collect()
    assert gone() is None


def spoiled(name: str) -> Callable[..., object]:
    """The CPU's backward pass with one gradient wrong."""
    right = cpu.adapter_backward

    def backward(*arguments: object) -> object:
        gradients = right(*arguments)
        wrong = {"w_up": torch.zeros_like, "x": lambda x: x + 0.02 * x.flip(0), "nan": lambda x: x * float("nan")}
        field = "x" if name == "nan" else name
        tensor = getattr(gradients, field)
        return gradients if tensor is None else gradients._replace(**{field: wrong[name](tensor)})

    return backward


@pytest.mark.parametrize("name", ["w_up", "x", "nan"])
def test_a_wrong_training_step_is_red_in_every_variant_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop(Setting("vit_tiny_patch16_224", 2, 4, 2, (("depth", 2), ("img_size", 32))), CPU)
    variants = [variant for variant in shop.variants() if variant.part == TRAINING and variant.ours]
    assert len(variants) == 4
    monkeypatch.setattr(cpu, "adapter_backward", spoiled(name))
    for variant in variants:
        row, made = admit_variant(shop, variant)
        assert row["status"] == "red", (variant.name, row)
        assert made is None


def test_a_step_that_is_not_finite_is_red_for_everybody() -> None:
    shop = Shop(Setting("vit_tiny_patch16_224", 2, 4, 2, (("depth", 1), ("img_size", 32))), CPU)
    for variant in shop.variants():
        if variant.part == TRAINING and variant.reason is None:
            made = variant.build()
            step = made.step
            assert step is not None
            wrong = made._replace(step=lambda step=step: {**step(), "loss": torch.tensor(float("nan"))})
            row, _ = admit_variant(shop, variant._replace(build=lambda wrong=wrong: wrong))
            assert row["reason"] == "error gate red: loss: not finite", row


def test_presets_name_the_models_of_the_paper() -> None:
    full = {setting.model for setting in settings("full", "cuda")}
    assert full == {"vit_base_patch16_224", "vit_large_patch16_224", "swin_base_patch4_window7_224"}
    assert all(setting.half for setting in settings("quick", "cuda"))
    assert [(s.model, s.batch) for s in settings("quick", "cpu", ["deit_tiny_patch16_224"], 3)] == [
        ("deit_tiny_patch16_224", 3)
    ]


def test_dense_copies_are_the_same_function_and_cost_what_they_cost() -> None:
    torch.manual_seed(0)
    fused = FusedMoSAAdapter(24, 8, 3)
    with torch.no_grad():
        fused.up.weight.normal_()
        fused.up.bias.normal_()
    copies = DenseCopiesAdapter(copy.deepcopy(fused))
    x, residual = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    for expert in range(3):
        for add_input in (True, False):
            expected = fused(x, residual, expert, add_input)
            torch.testing.assert_close(copies(x, residual, expert, add_input), expected)
    assert sum(mask.element_size() * mask.numel() for mask in copies.buffers()) == 3 * 24 * 8 * 8
    assert {tuple(parameter.shape) for parameter in copies.up.parameters()} == {(24, 8), (24,)}
    masks = torch.stack([up.mask for up in copies.up])  # type: ignore[misc]
    assert torch.equal(masks.sum(0), torch.ones(24, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="expected a dense down-projection"):
        DenseCopiesAdapter(FusedMoSAAdapter(24, 8, 3, sparse="down"))


def test_state_counts_weights_gradients_moments_and_owners() -> None:
    layer = nn.ModuleDict({"a": FusedMoSAAdapter(24, 8, 3, norm=False)})
    optimizer = torch.optim.AdamW(layer.parameters())
    layer["a"](torch.randn(1, 5, 24)).sum().backward()
    optimizer.step()
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    counts = 4 * len(list(layer.parameters()))
    assert state_bytes(layer, optimizer) == 16 * parameters + counts + 24 * 8
