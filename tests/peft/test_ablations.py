"""Every switch of the paper's ablations goes through injection, training mode, saving and merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm_models import SWIN, VIT, images, make, train_a_little

from mosa_kernels.functional.split import GRANULARITIES
from mosa_kernels.peft import MoSAConfig, inject_adapter, load_adapter, merge_and_unload, save_adapter, two_pass
from mosa_kernels.peft.book import book_of

SWITCHES = [
    *({"sparse": sparse} for sparse in ("up", "down", "both", "none")),  # Table 6
    *({"num_experts": count} for count in (1, 2, 3, 5, 8)),  # Table 9
    *({"bottleneck": size} for size in (4, 16, 256)),  # Figure 3
    *({"granularity": kind, "sparse": "both", "bottleneck": 32} for kind in GRANULARITIES),
    {"num_experts": (2, 5)},
    {"num_experts": (1, 8), "layers": (0, -1)},
    {"layers": (-1,), "num_experts": (3,)},
    {"merge_rule": "jigsaw", "expert_scale": "N"},
]


@pytest.mark.parametrize("style", ["adaptformer", "lora"])
@pytest.mark.parametrize("options", SWITCHES, ids=str)
def test_every_switch(options: dict, style: str, tmp_path: Path) -> None:
    family = SWIN if options.keys() == {"sparse"} else VIT
    model, x = make(family), images(family)
    with torch.no_grad():
        before = model(x)
        inject_adapter(model, MoSAConfig(style=style, **options))
        assert torch.equal(model(x), before)
    train_a_little(model)
    two_pass(model.train(), x).logits1.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        trained = model(x)
        assert torch.equal(load_adapter(make(family), tmp_path)(x), trained)
        torch.testing.assert_close(merge_and_unload(model)(x), trained, rtol=1e-5, atol=1e-5)


def test_a_dropout_for_each_block() -> None:
    def rates(**options: object) -> list[float]:
        model = inject_adapter(make(SWIN), MoSAConfig(bottleneck=4, **options))  # type: ignore[arg-type]
        return [adapter.dropout for _, _, adapter in book_of(model).adapters("default")]

    assert rates(dropout="0:0.3") == [0, 0.1, 0.2, 0.3]
    assert rates(dropout=[0.5, 0.2], layers=(-1, 0)) == [0.5, 0.2], "in the order of the blocks"
    assert rates(dropout="0.2:0.4", layers=(1, 2), style="houlsby") == [0.2, 0.2, 0.4, 0.4]
    assert rates(dropout=(0, 0.1), layers=(0, 3), style="lora", mode="dense") == [0, 0, 0.1, 0.1]
    model = make(SWIN)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="one for each of the 4 blocks, got 2"):
        inject_adapter(model, MoSAConfig(dropout=(0.2, 0.3)))
    assert list(model.state_dict()) == keys


def test_a_number_of_experts_for_each_block() -> None:
    def experts(**options: object) -> list[int]:
        model = inject_adapter(make(SWIN), MoSAConfig(bottleneck=4, **options))  # type: ignore[arg-type]
        return [adapter.num_experts for _, _, adapter in book_of(model).adapters("default")]

    assert experts(num_experts=(1, 2, 3, 4)) == [1, 2, 3, 4]
    assert experts(num_experts=[5, 2], layers=(-1, 0)) == [5, 2], "in the order of the blocks"
    assert experts(num_experts=(2, 3), layers=(1, 2), style="houlsby") == [2, 2, 3, 3]
    assert experts(sparse="none", num_experts=4) == [1] * 4
    model = make(SWIN)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="one for each of the 4 blocks with adapters, got 2"):
        inject_adapter(model, MoSAConfig(num_experts=(2, 3)))
    assert list(model.state_dict()) == keys


@torch.no_grad()
def test_dense_down_and_dense_up_is_one_plain_adapter() -> None:
    x, outputs = images(), []
    for options in ({"sparse": "none"}, {"mode": "dense"}):
        torch.manual_seed(0)
        model = make()
        torch.manual_seed(0)
        inject_adapter(model, MoSAConfig(bottleneck=4, **options))  # type: ignore[arg-type]
        train_a_little(model)
        outputs.append(model.train()(x))
    assert torch.equal(*outputs)
