"""Several tasks in one forward pass give what each gives on its own."""

from __future__ import annotations

import pytest
import torch
from timm_models import FAMILIES, SWIN, VIT, Family, images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.optim import MoSAAdamW
from mosa_kernels.peft import (
    MoSAConfig,
    adapters_per_sample,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_adapter,
    save_adapter,
    set_adapter,
    trainable_parameters,
    two_pass,
)
from mosa_kernels.peft.book import book_of

DISTILLED = next(family for family in FAMILIES if "distilled" in family.name)
POST_NORM = next(family for family in FAMILIES if family.name == "vit_relpos_base_patch16_rpn_224")
TASKS = {
    "ffn": ({"bottleneck": 4}, 3),
    "attention": ({"style": "lora", "bottleneck": 4, "num_experts": 2}, 5),
    "both": ({"style": "houlsby", "bottleneck": 3, "layers": (1,)}, None),
    "late": ({"style": "pfeiffer", "mode": "pruned", "bottleneck": 4}, 3),
    "head": ({"method": "linear"}, 2),
}
NAMES = ["attention", "ffn", "head", "attention", "both", "late", "ffn"]


def several(family: Family = VIT) -> nn.Module:
    model = make(family)
    for seed, (name, (options, classes)) in enumerate(TASKS.items()):
        inject_adapter(model, MoSAConfig(**options), name, num_classes=classes)  # type: ignore[arg-type]
        train_a_little(model, name, seed)
    return model


def one_by_one(model: nn.Module, x: Tensor, names: list[str]) -> list[Tensor]:
    return [set_adapter(model, name)(x[i : i + 1])[0] for i, name in enumerate(names)]


@pytest.mark.parametrize("family", [VIT, SWIN, DISTILLED, POST_NORM], ids=lambda family: family.name)
@torch.no_grad()
def test_every_image_meets_its_own(family: Family) -> None:
    model, x = several(family), images(family, len(NAMES))
    expected = one_by_one(model, x, NAMES)
    set_adapter(model, "late")
    alone = model(x)
    with adapters_per_sample(model, NAMES) as same:
        assert same is model
        logits = model(x)
    assert logits.shape == (len(NAMES), 10)
    for row, truth in zip(logits, expected, strict=True):
        torch.testing.assert_close(row[: len(truth)], truth, rtol=1e-5, atol=1e-5)
        assert torch.equal(row[len(truth) :], torch.full((10 - len(truth),), -torch.inf))
    assert torch.equal(model(x), alone), "afterwards all is as before"
    with adapters_per_sample(model, ["ffn"] * 2 + ["late"]):
        assert model(x[:3]).shape == (3, 3)


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
def test_gradients_are_those_of_separate_passes(family: Family) -> None:
    model, x = several(family), images(family, len(NAMES))
    targets = torch.tensor([4, 2, 1, 0, 9, 1, 0])
    gradients = []
    for together in (True, False):
        model.zero_grad()
        if together:
            with adapters_per_sample(model, NAMES):
                torch.nn.functional.cross_entropy(model(x), targets, reduction="sum").backward()
        else:
            for i, row in enumerate(NAMES):
                set_adapter(model, row)
                torch.nn.functional.cross_entropy(model(x[i : i + 1]), targets[i : i + 1]).backward()
        gradients.append({name: p.grad.clone() for name, p in book_parameters(model).items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


def book_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapters and heads by a name that does not depend on which is active."""
    book = book_of(model)
    set_adapter(model, "head")
    found = {f"head.{i}": p for i, p in enumerate(model.head.parameters())}
    for name, head in book.heads.items():
        found |= {f"{name}.head.{i}": p for i, p in enumerate(head.parameters())}
    for name in book.configs:
        for path, site, adapter in book.adapters(name):
            found |= {f"{name}.{path}.{site}.{key}": p for key, p in adapter.named_parameters()}
    return found


def test_training_several_tasks_at_once() -> None:
    model, x = several().train(), images(batch=len(NAMES))
    model.set_grad_checkpointing(True)
    set_adapter(model, "late")
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: p.detach().clone() for name, p in book_parameters(model).items()}
    set_adapter(model, "late")
    with adapters_per_sample(model, ["ffn", "attention"]):
        optimizer = MoSAAdamW(model, lr=0.1)
        torch.nn.functional.cross_entropy(model(x[:2]), torch.tensor([1, 4])).backward()
    optimizer.step()
    assert [p.requires_grad for p in model.parameters()] == flags
    moved = {name for name, p in book_parameters(model).items() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == {"ffn", "attention"}
    assert {"ffn.head.0", "attention.head.0"} <= moved
    assert not any(
        p.grad is not None for name, p in model.named_parameters() if ".mosa." not in f".{name}." and "head" not in name
    )


def test_a_backward_pass_after_the_context_is_an_error() -> None:
    """PyTorch drops gradients of parameters that no longer require them; where an optimizer watches, it is said."""
    model, names = several(), ["ffn", "attention"]
    with adapters_per_sample(model.train(), names):
        optimizer = MoSAAdamW(model)
        loss = model(images(VIT, 2)).square().sum()
    with pytest.raises(RuntimeError, match=r"its gradient is lost: run backward\(\) within adapters_per_sample"):
        loss.backward()
    optimizer.zero_grad()
    with adapters_per_sample(model, names):
        model(images(VIT, 2)).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def test_one_graph_for_several_tasks() -> None:
    torch._dynamo.reset()
    model, x = make(), images(batch=3)
    for name, options in (("a", {}), ("b", {"style": "lora"})):
        inject_adapter(model, MoSAConfig(bottleneck=4, **options), name)  # type: ignore[arg-type]
        train_a_little(model, name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with adapters_per_sample(model, ["b", "a", "b"]):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_experts_are_drawn_for_each_group() -> None:
    model = make()
    for name in ("a", "b"):
        inject_adapter(model, MoSAConfig(style="lora", bottleneck=4), name)
        train_a_little(model, name)
    x = images(batch=1).expand(32, -1, -1, -1)
    with adapters_per_sample(model.train(), ["a", "b"] * 16):
        torch.manual_seed(0)
        first = model(x)
        assert len(first[::2].unique(dim=0)) > 4
        torch.manual_seed(0)
        assert torch.equal(model(x), first)


def test_what_it_refuses(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = several(), images(batch=2)
    inject_adapter(model, MoSAConfig(method="bitfit"), "bitfit")
    with pytest.raises(ValueError, match="names: 'bitfit' is of method 'bitfit', which changes the backbone"):
        adapters_per_sample(model, ["ffn", "bitfit"]).__enter__()
    with pytest.raises(ValueError, match=r"adapter_name: expected one of .* got 'no'"):
        adapters_per_sample(model, ["ffn", "no"]).__enter__()
    with pytest.raises(ValueError, match="names: expected one for each image, got none"):
        adapters_per_sample(model, []).__enter__()
    with pytest.raises(TypeError, match="names: expected a list with an adapter's name for each image, got 'ffn'"):
        adapters_per_sample(model, "ffn").__enter__()
    with disable_adapter(model), pytest.raises(ValueError, match="expected an active adapter"):
        adapters_per_sample(model, ["ffn"]).__enter__()
    set_adapter(model, "attention")
    with adapters_per_sample(model, ["ffn", "late", "both"]):
        with pytest.raises(ValueError, match="expected as many images as names, 3, got 2"):
            model(x)
        for act in (
            lambda: set_adapter(model, "ffn"),
            lambda: inject_adapter(model, MoSAConfig(), "new"),
            lambda: delete_adapter(model, "ffn"),
            lambda: merge_adapter(model),
            lambda: save_adapter(model, tmp_path),
            lambda: two_pass(model.train(), x),
            lambda: trainable_parameters(model),
            lambda: adapters_per_sample(model, ["ffn"]).__enter__(),
        ):
            with pytest.raises(ValueError, match="expected to be outside of adapters_per_sample"):
                act()
    merge_adapter(model.eval())
    with pytest.raises(ValueError, match="merged into the frozen weights"):
        adapters_per_sample(model, ["ffn"]).__enter__()
