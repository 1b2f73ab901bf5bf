"""Section 4.1's parameter counts, to the digits that the paper prints."""

from __future__ import annotations

import pytest
import timm
import torch
from timm_models import make, train_a_little

from mosa_kernels.peft import MoSAConfig, disable_adapter, inject_adapter, set_adapter, trainable_parameters
from mosa_kernels.peft.config import METHODS
from mosa_kernels.peft.count import TrainableParameters


def counted(name: str, num_classes: int = 100, **options: object) -> TrainableParameters:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=num_classes)
    return trainable_parameters(inject_adapter(model, MoSAConfig(**options)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "millions", "backbone"),
    [
        ("vit_base_patch16_224", {"norm": False}, "1.19", "85.80"),
        ("vit_base_patch16_224", {"norm": False, "bottleneck": 16}, "0.30", "85.80"),
        ("vit_large_patch16_224", {"norm": False}, "3.17", "303.30"),
        ("swin_base_patch4_window7_224", {"norm": False}, "1.55", "86.74"),
        ("vit_base_patch16_224", {"style": "pfeiffer"}, "1.21", "85.80"),
        ("vit_base_patch16_224", {"style": "houlsby"}, "2.38", "85.80"),
        ("vit_base_patch16_224", {"norm": False, "mode": "pruned"}, "0.30", "85.80"),
        ("vit_base_patch16_224", {"style": "lora", "bottleneck": 16, "mode": "dense"}, "0.59", "85.80"),
        ("vit_base_patch16_224", {"style": "lora", "bottleneck": 16, "mode": "pruned"}, "0.15", "85.80"),
        ("vit_base_patch16_224", {"style": "lora", "bottleneck": 16}, "0.59", "85.80"),
        ("vit_base_patch16_224", {"method": "full"}, "85.80", "85.80"),
        ("vit_base_patch16_224", {"method": "bitfit"}, "0.10", "85.80"),
        ("vit_base_patch16_224", {"method": "linear"}, "0.00", "85.80"),
    ],
)
def test_the_papers_counts(name: str, options: dict, millions: str, backbone: str) -> None:
    count = counted(name, **options)
    assert f"{count.millions:.2f}" == millions
    assert f"{count.backbone / 1e6:.2f}" == backbone
    assert counted(name, num_classes=0, **options).backbone == count.backbone


@pytest.mark.parametrize(
    ("options", "exactly"),
    [
        ({"style": "lora", "bottleneck": 16}, 12 * 2 * 2 * 16 * 768),
        ({"style": "lora", "bottleneck": 16, "mode": "pruned"}, 12 * 2 * 2 * 16 * 768 // 4),
        ({"style": "lora", "bottleneck": 4, "lora_targets": ("q", "k", "v", "proj")}, 12 * 4 * 2 * 4 * 768),
        ({"method": "bitfit"}, 12 * (768 + 3 * 768 + 768 + 768 + 3072 + 768) + 2 * 768),
        ({"method": "vpt-shallow", "prompt_length": 100}, 100 * 768),
        ({"method": "vpt-deep", "prompt_length": 50}, 12 * 50 * 768),
        ({"method": "vpt-deep", "prompt_length": 50, "layers": (0, 1, 2)}, 3 * 50 * 768),
        ({"method": "linear"}, 0),
    ],
    ids=str,
)
def test_counts_to_the_last_parameter(options: dict, exactly: int) -> None:
    count = counted("vit_base_patch16_224", **options)
    assert count.adapter.active == exactly
    assert (count.head, count.backbone) == (76900, 85798656)


def test_a_pruned_adapter_keeps_a_quarter_of_the_weights() -> None:
    model = inject_adapter(make(), MoSAConfig(mode="pruned", bottleneck=8))
    count = trainable_parameters(model)
    for kind in ("down weights", "up weights"):
        assert count.kinds[kind].active * 4 == count.kinds[kind].stored == 2 * 8 * 48


def test_totals_agree_with_what_takes_gradients() -> None:
    baselines = [{"method": method} for method in METHODS]
    styles = [{"mode": "dense"}, {"mode": "pruned"}, {"learnable_scale": True, "expert_bias": False}, {"style": "lora"}]
    for options in (*styles, *baselines):
        model = inject_adapter(make(), MoSAConfig(bottleneck=8, **options))  # type: ignore[arg-type]
        inject_adapter(model, MoSAConfig(bottleneck=3), "another", num_classes=7)
        for name in ("another", "default"):
            count = trainable_parameters(set_adapter(model, name))
            assert count.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert count.backbone == sum(p.numel() for p in make(num_classes=0).parameters())
            assert count.head == (7 if name == "another" else 10) * 49


def test_further_biases_are_apart() -> None:
    shared = trainable_parameters(inject_adapter(make(), MoSAConfig(bottleneck=8, expert_bias=False)))
    own = trainable_parameters(inject_adapter(make(), MoSAConfig(bottleneck=8)))
    assert own.adapter == shared.adapter
    assert (shared.expert_biases, own.expert_biases) == (0, 2 * 3 * 48)


def test_the_table_reads_well() -> None:
    table = str(counted("vit_base_patch16_224", mode="pruned"))
    assert [line.split("  ")[0] for line in table.splitlines()] == [
        "trainable parameters",
        "down weights",
        "up weights",
        "biases",
        "norms",
        "adapter",
        "adapter without norms",
        "head",
        "total",
        "backbone (frozen)",
    ]
    assert "589,824       147,456" in table


def test_the_papers_count_is_that_without_norms() -> None:
    table = str(counted("vit_base_patch16_224"))
    assert "adapter                          1,208,064     1,208,064" in table
    assert "adapter without norms            1,189,632     1,189,632" in table
    assert "without norms" not in str(counted("vit_base_patch16_224", norm=False))


def test_without_an_active_adapter_there_is_nothing_to_count() -> None:
    model = make()
    with pytest.raises(ValueError, match="expected one with adapters"):
        trainable_parameters(model)
    inject_adapter(model, MoSAConfig())
    train_a_little(model)
    with disable_adapter(model), pytest.raises(ValueError, match="expected an active adapter"):
        trainable_parameters(model)


@pytest.mark.parametrize(
    ("options", "frozen", "kind"),
    [
        ({}, "up.bias", "biases"),
        ({}, "norm", "norms"),
        ({"mode": "pruned"}, "down.weight", "down weights"),
        ({"learnable_scale": True}, "scale", "scales"),
        ({"style": "lora"}, "blocks.0.mosa", "up weights"),
        ({"method": "vpt-deep"}, "blocks.1.mosa", "prompts"),
        ({"method": "bitfit"}, "blocks.0.norm1", "backbone"),
        ({}, "head", None),
    ],
    ids=str,
)
def test_what_somebody_has_frozen_is_not_counted(options: dict, frozen: str, kind: str | None) -> None:
    model = inject_adapter(make(), MoSAConfig(bottleneck=8, **options))
    before = trainable_parameters(model)
    parameters = [parameter for name, parameter in model.named_parameters() if frozen in name]
    for parameter in parameters:
        parameter.requires_grad_(False)
    count = trainable_parameters(model)
    assert count.total == sum(p.numel() for p in model.parameters() if p.requires_grad) < before.total
    assert count.backbone == before.backbone
    if kind is not None:
        assert count.head == before.head
        assert count.kinds[kind].stored < before.kinds[kind].stored
    with torch.no_grad():
        assert trainable_parameters(model) == count
