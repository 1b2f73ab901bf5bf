"""Section 4.1's parameter counts, to the digits that the paper prints."""

from __future__ import annotations

import pytest
import timm
import torch
from timm_models import make, train_a_little

from mosa_kernels.peft import MoSAConfig, disable_adapter, inject_adapter, trainable_parameters
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
    ],
)
def test_the_papers_counts(name: str, options: dict, millions: str, backbone: str) -> None:
    count = counted(name, **options)
    assert f"{count.millions:.2f}" == millions
    assert f"{count.backbone / 1e6:.2f}" == backbone
    assert counted(name, num_classes=0, **options).backbone == count.backbone


def test_a_pruned_adapter_keeps_a_quarter_of_the_weights() -> None:
    model = inject_adapter(make(), MoSAConfig(mode="pruned", bottleneck=8))
    count = trainable_parameters(model)
    for kind in ("down weights", "up weights"):
        assert count.kinds[kind].active * 4 == count.kinds[kind].stored == 2 * 8 * 48


def test_totals_agree_with_what_takes_gradients() -> None:
    for options in ({}, {"mode": "dense"}, {"mode": "pruned"}, {"learnable_scale": True, "expert_bias": False}):
        model = inject_adapter(make(), MoSAConfig(bottleneck=8, **options))  # type: ignore[arg-type]
        inject_adapter(model, MoSAConfig(bottleneck=3), "another", num_classes=7)
        for count in (trainable_parameters(model),):
            assert count.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert count.backbone == sum(p.numel() for p in make(num_classes=0).parameters())
            assert count.head == 7 * 49


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
        "adapter (as papers count)",
        "head",
        "total",
        "backbone (frozen)",
    ]
    assert "589,824       147,456" in table


def test_without_an_active_adapter_there_is_nothing_to_count() -> None:
    model = make()
    with pytest.raises(ValueError, match="expected one with adapters"):
        trainable_parameters(model)
    inject_adapter(model, MoSAConfig())
    train_a_little(model)
    with disable_adapter(model), pytest.raises(ValueError, match="expected an active adapter"):
        trainable_parameters(model)
