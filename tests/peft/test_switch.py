from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm_models import SWIN, VIT, Family, images, make, train_a_little
from torch import nn

from mosa_kernels.peft import (
    MoSAConfig,
    active_adapter,
    adapter_names,
    delete_adapter,
    disable_adapter,
    inject_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
)


def two_tasks(family: Family = VIT) -> nn.Module:
    model = inject_adapter(make(family), MoSAConfig(bottleneck=4), "pets")
    train_a_little(model, "pets")
    with torch.no_grad():
        model.get_classifier().weight.mul_(2)
    inject_adapter(model, MoSAConfig(bottleneck=3, layers=(0, -1)), "cars", num_classes=4)
    train_a_little(model, "cars")
    return model


@pytest.mark.parametrize("family", [VIT, SWIN], ids=lambda family: family.name)
@torch.no_grad()
def test_each_name_has_weights_and_a_head_of_its_own(family: Family) -> None:
    backbone, x = make(family)(images(family)), images(family)
    model = two_tasks(family)
    assert (adapter_names(model), active_adapter(model), model.num_classes) == (["pets", "cars"], "cars", 4)
    cars = model(x)
    pets = set_adapter(model, "pets")(x)
    assert (cars.shape, pets.shape, model.num_classes) == ((2, 4), (2, 10), 10)
    assert not torch.allclose(pets, backbone)
    for _ in range(2):
        assert torch.equal(set_adapter(model, "cars")(x), cars)
        with disable_adapter(model):
            assert active_adapter(model) is None
            assert torch.equal(model(x), backbone)
            with disable_adapter(model):
                assert torch.equal(model(x), backbone)
            assert torch.equal(model(x), backbone)
        assert torch.equal(model(x), cars)
        assert torch.equal(set_adapter(model, "pets")(x), pets)


def test_only_the_active_one_trains() -> None:
    model = two_tasks()
    for name, other in (("cars", "pets"), ("pets", "cars")):
        set_adapter(model, name)
        trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"head.weight", "head.bias"} < trainable
        assert all(f".mosa.{name}." in key or key.startswith("head.") for key in trainable)
        assert not any(f".{other}." in key for key in trainable)
        with disable_adapter(model):
            assert not model.head.weight.requires_grad
        assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_a_context_that_fails_still_ends() -> None:
    model = two_tasks()
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert active_adapter(model) == "cars"
    assert model.num_classes == 4


@torch.no_grad()
def test_deleting_the_active_one_activates_another() -> None:
    model, x = two_tasks(), images()
    pets = set_adapter(model, "pets")(x)
    set_adapter(model, "cars")
    delete_adapter(model, "cars")
    assert torch.equal(model(x), pets)
    assert not any("cars" in key for key in model.state_dict())
    delete_adapter(model, "pets")
    assert torch.equal(model(x), make()(x))
    with pytest.raises(ValueError, match="expected one with adapters"):
        adapter_names(model)


def test_unknown_names() -> None:
    model = two_tasks()
    with pytest.raises(ValueError, match="adapter_name: expected one of 'pets', 'cars', got 'dogs'"):
        set_adapter(model, "dogs")
    with pytest.raises(ValueError, match="adapter_name: expected one of 'pets', 'cars', got"):
        set_adapter(model, ["pets"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one with adapters"), disable_adapter(make()):
        pass


def test_the_state_dict_of_an_active_task_loads_back() -> None:
    model, other, x = two_tasks(), two_tasks(), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(set_adapter(other, "pets")(x), set_adapter(model, "pets")(x))


def test_a_checkpoint_of_the_backbone_still_loads() -> None:
    model = inject_adapter(make(), MoSAConfig(bottleneck=4))
    torch.manual_seed(5)
    plain = make()
    with torch.no_grad():
        plain.blocks[0].mlp.fc1.weight.add_(1)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all("mosa" in key for key in missing)
    assert torch.equal(model(images()), plain(images()))


def test_without_an_active_adapter_a_name_is_asked_for(tmp_path: Path) -> None:
    model = two_tasks()
    calls = (
        lambda name: save_adapter(model, tmp_path / "cars", name),
        lambda name: merge_and_unload(model, adapter_name=name),
    )
    for call in calls:
        with disable_adapter(model):
            with pytest.raises(
                ValueError, match="adapter_name: expected one, for within disable_adapter none is active"
            ):
                call(None)
            call("cars")


@torch.no_grad()
def test_what_is_done_to_a_disabled_model_lasts() -> None:
    x = images()
    model = two_tasks()
    expected = set_adapter(copy.deepcopy(model), "pets")(x)
    with disable_adapter(model):
        delete_adapter(model, "cars")
    assert active_adapter(model) == "pets"
    assert torch.equal(model(x), expected)
    with disable_adapter(model):
        delete_adapter(model, "pets")
    assert torch.equal(model(x), make()(x))

    model = two_tasks()
    with disable_adapter(model):
        merge_and_unload(model, adapter_name="pets")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "inside",
    [lambda model: set_adapter(model, "pets"), lambda model: inject_adapter(model, MoSAConfig(bottleneck=2), "dogs")],
)
def test_after_a_switch_within_disable_adapter_the_first_trains_again(inside: Callable[[nn.Module], nn.Module]) -> None:
    model = two_tasks()
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    with disable_adapter(model):
        inside(model)
    assert active_adapter(model) == "cars"
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_a_baseline_trains_after_disable_adapter_too(method: str) -> None:
    model = inject_adapter(make(), MoSAConfig(method=method))
    model.blocks[0].mlp.fc1.bias.requires_grad_(False)  # its user's wish
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    with disable_adapter(model):
        assert all(key.startswith("mosa.") for key, parameter in model.named_parameters() if parameter.requires_grad)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == before
    assert sum(before.values()) > 2
