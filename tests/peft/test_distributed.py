"""Adapters in models that DistributedDataParallel wraps or FSDP2 shards: what works, and what is refused by name."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_models import images, make, train_a_little
from torch import nn

from mosa_kernels.optim import MoSAAdamW
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
)

RANKS = 2
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")


def sharded(model: nn.Module) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def config_of(style: str) -> MoSAConfig:
    return MoSAConfig(style=style, bottleneck=4, learnable_scale=True)


def adapted(style: str = "adaptformer") -> Any:
    model = inject_adapter(make(), config_of(style))
    train_a_little(model)
    return model


@torch.no_grad()
def check_saving_and_loading(style: str, folder: Path) -> None:
    x, before = images(), adapted(style)(images())
    save_adapter(sharded(adapted(style)), folder / style)
    torch.distributed.barrier()
    assert torch.equal(load_adapter(make(), folder / style)(x), before)

    fresh = sharded(inject_adapter(make(), config_of(style)))
    assert not torch.equal(fresh(x), before)
    load_adapter(fresh, folder / style)
    assert torch.equal(fresh(x), before)


def check_refusals_of_a_sharded_model(folder: Path) -> None:
    expected = "expected whole parameters, got .* sharded by fully_shard; "
    model = sharded(adapted("lora"))
    before = model(images())
    for change, advice in (
        (lambda: inject_adapter(model, MoSAConfig(), "other"), "inject before"),
        (lambda: load_adapter(model, folder / "lora", "other"), "inject before"),
        (lambda: delete_adapter(model, "default"), "delete before"),
        (lambda: merge_adapter(model), "save_adapter on every rank"),
        (lambda: merge_and_unload(model), "save_adapter on every rank"),
    ):
        with pytest.raises(ValueError, match=expected + advice):
            change()
        assert torch.equal(model(images()), before)

    model = make()
    for name in ("bitfit", "linear"):
        inject_adapter(model, MoSAConfig(method=name), name)
    with pytest.raises(ValueError, match=expected + "switch before"):
        set_adapter(sharded(model), "bitfit")


def check_wrapped_models(folder: Path) -> None:
    for change in (
        lambda model: inject_adapter(model, MoSAConfig()),
        lambda model: load_adapter(model, folder / "lora"),
    ):
        with pytest.raises(ValueError, match="expected one that is not wrapped yet, got a DistributedDataParallel"):
            change(nn.parallel.DistributedDataParallel(make()))

    model = inject_adapter(adapted(), MoSAConfig(bottleneck=4), "second")
    wrapped = nn.parallel.DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_adapter(wrapped, "second")
        with disable_adapter(wrapped):
            pass
    with pytest.warns(UserWarning, match="keeps in step only what trained when it was made, which 'default' did not"):
        set_adapter(wrapped, "default")


def check_moves_of_a_sharded_model() -> None:
    model = sharded(adapted()).train()
    optimizer = MoSAAdamW(model)
    adapter = model.blocks[0].mosa.default.parallel_ffn
    for _ in range(2):
        model.to("cpu")
        before = [adapter.down.weight.full_tensor().clone(), adapter.scale.full_tensor().clone()]
        model(images()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(adapter.down.weight.full_tensor(), before[0])
        assert not torch.equal(adapter.scale.full_tensor(), before[1])


def check_reset_of_a_sharded_model() -> None:
    with torch.device("meta"):
        model = inject_adapter(make(), MoSAConfig(bottleneck=4, sparse="both"))
    model = sharded(model).to_empty(device="cpu")
    adapter = model.blocks[0].mosa.default.parallel_ffn
    adapter.reset_parameters()
    assert torch.equal(adapter.down.initial, adapter.down.weight.full_tensor())
    assert adapter.down.assignment.unique().tolist() == adapter.up.assignment.unique().tolist() == [0, 1, 2, 3]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    with contextlib.ExitStack() as last:
        last.callback(torch.distributed.destroy_process_group)
        for style in ("adaptformer", "lora"):
            check_saving_and_loading(style, Path(folder))
        check_refusals_of_a_sharded_model(Path(folder))
        check_wrapped_models(Path(folder))
        check_moves_of_a_sharded_model()
        check_reset_of_a_sharded_model()
        torch.distributed.barrier()


def test_every_rank_does_the_same(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
