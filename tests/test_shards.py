"""MoSAAdamW under FSDP2: three ranks that share every parameter move as one process that sees all their images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosa_kernels import MoSAAdamW, MoSAConfig, inject_adapter

RANKS = 3
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")


def adapted_model() -> nn.Module:
    """One expert for all images of a pass: ranks activate different ones. Four rows of biases for three ranks."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_classes=3)
    config = MoSAConfig(bottleneck=5, num_experts=4, expert_per="batch", sparse="both")
    inject_adapter(model, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def loss(model: nn.Module, number: int, rank: int) -> Tensor:
    torch.manual_seed(1000 * number + rank)
    return model(torch.randn(2, 3, 32, 32)).square().mean()


def train(model: nn.Module, ranks: range, share: float) -> dict[str, Tensor]:
    """Six updates of two passes each; the gradient is cleared in both ways. Returns parameters and step counts."""
    optimizer = MoSAAdamW(model, lr=0.01, weight_decay=0.1)
    for update in range(6):
        for half in range(2):
            if hasattr(model, "set_requires_gradient_sync"):  # sharded; every other time each pass synchronises
                model.set_requires_gradient_sync(half == 1 or update in (2, 3))
            for rank in ranks:
                (loss(model, 2 * update + half, rank) * share / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=update % 2 == 0)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = whole(parameter.detach())
            found[f"{name} step"] = optimizer.state[parameter]["step"]
            found[f"{name} exp_avg"] = whole(optimizer.state[parameter]["exp_avg"])
    return found


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _rank(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    model = adapted_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = train(model, range(rank, rank + 1), 1.0)  # FSDP2 averages over the ranks
    if rank == 0:
        save_file(found, f"{folder}/sharded.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_sharded_parameters_move_as_whole_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    sharded = load_file(tmp_path / "sharded.safetensors")
    expected = train(adapted_model(), range(RANKS), 1 / RANKS)
    assert sharded.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4, msg=partial("{}: {}".format, name))
        if name.endswith("step"):
            assert torch.equal(sharded[name], value), name
    steps = [value for name, value in expected.items() if name.endswith("up.bias step")]
    assert all(0 < value.min() < 6 for value in steps), "every expert moves, none of them always"
