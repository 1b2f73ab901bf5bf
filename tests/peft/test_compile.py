"""One graph for every expert, also under activation checkpointing and with features collected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from timm_models import SWIN, VIT, Family, images, make, train_a_little
from torch._dynamo.testing import CompileCounterWithBackend

from mosa_kernels.peft import MoSAConfig, inject_adapter, set_adapter, two_pass

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "small", "options", "checkpointing"),
    [
        (VIT, {}, {}, False),
        (VIT, {}, {}, True),
        (SWIN, {"depths": (1, 1)}, {}, True),
        (VIT, {}, {"style": "lora", "lora_targets": ("q", "v", "proj")}, True),
        (SWIN, {"depths": (1, 1)}, {"style": "lora"}, True),
    ],
    ids=["vit", "vit-checkpointed", "swin-checkpointed", "vit-lora-checkpointed", "swin-lora-checkpointed"],
)
def test_one_graph_serves_every_expert(family: Family, small: dict, options: dict, checkpointing: bool) -> None:
    config = MoSAConfig(bottleneck=4, dropout=0.2, **options)
    model, x = inject_adapter(make(family, **small), config).train(), images(family)
    train_a_little(model)
    model.set_grad_checkpointing(checkpointing)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    outputs = []
    for seed in range(4):
        torch.manual_seed(seed)
        outputs.append(compiled(x))
        outputs[-1].sum().backward()
        torch.manual_seed(seed)
        torch.testing.assert_close(outputs[-1], model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    assert not torch.allclose(outputs[0], outputs[1])


def test_switching_is_seen() -> None:
    model, x = inject_adapter(make(), MoSAConfig(bottleneck=4), "a"), images()
    inject_adapter(model, MoSAConfig(bottleneck=4), "b")
    train_a_little(model, "b")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


RECORDS_IN_CHECKPOINTS = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"),
    reason="this PyTorch compiles no checkpointed block that keeps its output, as features are kept",
)


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=RECORDS_IN_CHECKPOINTS)], ids=["plain", "checkpointed"]
)
def test_two_passes_of_a_compiled_model(checkpointing: bool) -> None:
    model, x = inject_adapter(make(), MoSAConfig(bottleneck=4, dropout=0.2)).train(), images()
    train_a_little(model)
    model.set_grad_checkpointing(checkpointing)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(3):
        results = []
        for runner in (compiled, model):
            model.zero_grad()
            torch.manual_seed(seed)
            out = two_pass(runner, x)
            (out.logits1.square().sum() + out.logits2.sum() + out.features1[0].square().mean()).backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
            results.append([out.logits1, out.logits2, *out.features1, *out.features2, *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
