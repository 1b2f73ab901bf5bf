"""A timm backbone with adapters inside a model of somebody's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm_models import images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.losses import MoSALoss
from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import (
    MoSAConfig,
    inject_adapter,
    load_adapter,
    merge_and_unload,
    save_adapter,
    trainable_parameters,
    two_pass,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = inject_adapter(make(num_classes=0), MoSAConfig(bottleneck=4))
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_it_trains_counts_and_merges_as_a_whole() -> None:
    net, x = Net().train(), images()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = MoSAAdamW(net, lr=1e-2)
    for _ in range(2):
        MoSALoss()(two_pass(net, x), torch.tensor([0, 2])).backward()
        optimizer.step()
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"head.weight", "head.bias", "backbone.blocks.0.mosa.default.parallel_ffn.down.weight"} <= moved
    assert all(name.startswith("head.") or ".mosa." in name for name in moved)

    count = trainable_parameters(net)
    assert count.total == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert (count.head, trainable_parameters(net.backbone).head) == (49 * 3, 0)
    assert count.backbone == trainable_parameters(net.backbone).backbone

    expected = net.eval()(x)
    assert merge_and_unload(net) is net
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(".mosa." in name for name in net.state_dict())


def test_a_resting_backbone_is_refused() -> None:
    net = Net().train()
    net.backbone.eval()
    with pytest.raises(RuntimeError, match="expected the model in training mode"):
        two_pass(net, images())


def test_a_compiled_backbone_within() -> None:
    net = Net().train()
    net.backbone = torch.compile(net.backbone, backend="eager")  # type: ignore[assignment]
    assert two_pass(net, images()).logits1.shape == (2, 3)
    with pytest.raises(ValueError, match=r"pass model\.backbone$"):
        save_adapter(net, "nowhere")


@torch.no_grad()
def test_what_needs_the_backbone_says_where_it_is(tmp_path: Path) -> None:
    net, x = Net().eval(), images()
    train_a_little(net.backbone)
    with pytest.raises(ValueError, match=r"got a Net around it; pass model\.backbone$"):
        save_adapter(net, tmp_path)
    save_adapter(net.backbone, tmp_path)
    other = load_adapter(make(num_classes=0), tmp_path)
    assert torch.equal(other(x), net.backbone(x))
    pair = nn.ModuleDict({"one": net, "two": Net()})
    for function in (save_adapter, two_pass):
        with pytest.raises(ValueError, match=r"pass model\.one\.backbone or model\.two\.backbone$"):
            function(pair, x)  # type: ignore[operator]
    with pytest.raises(ValueError, match="see inject_adapter"):
        trainable_parameters(nn.Sequential(make()))
