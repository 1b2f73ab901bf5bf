"""The training state: what is written comes back, to the bit, and is complete or absent."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mosa_kernels.train import state


def test_nested_values_come_back_with_their_types(tmp_path: Path):
    value = {
        "a": torch.randn(3, 2),
        "b": [1, 2.5, None, True, "text", (torch.arange(3), [])],
        3: {"empty": {}, "owner": torch.tensor([1, 2], dtype=torch.uint8), "scalar": torch.tensor(2.0)},
        "half": torch.randn(4).bfloat16(),
    }
    state.write_part(tmp_path, "run", value)
    back = state.read_part(tmp_path, "run")
    assert list(back) == ["a", "b", 3, "half"]
    assert back["b"][:5] == value["b"][:5]
    assert isinstance(back["b"][5], tuple)
    assert torch.equal(back["b"][5][0], torch.arange(3))
    for left, right in ((back["a"], value["a"]), (back[3]["owner"], value[3]["owner"]), (back["half"], value["half"])):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    assert back[3]["scalar"].shape == ()


def test_tensors_that_share_memory_and_views_are_saved(tmp_path: Path):
    base = torch.arange(12.0).view(3, 4)
    state.write_part(tmp_path, "run", {"base": base, "again": base, "turned": base.T})
    back = state.read_part(tmp_path, "run")
    assert torch.equal(back["turned"], base.T)
    assert torch.equal(back["again"], base)


def test_what_neither_json_nor_tensors_hold_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match=r"state run/x: expected tensors, .* got object"):
        state.write_part(tmp_path, "run", {"x": object()})


def test_random_numbers_go_on_where_they_were(tmp_path: Path):
    np.random.standard_normal()  # leaves a second normal number waiting in the generator
    state.write_part(tmp_path, "process-0", state.random_state())
    expected = random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state.set_random_state(state.read_part(tmp_path, "process-0"))
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) == expected


def test_only_what_training_changes_is_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    kept = state.trained_state(model)
    assert "0.weight" not in kept
    assert {"1.running_mean", "2.weight", "2.bias"} <= kept.keys()


def test_a_state_of_another_model_is_refused():
    kept = state.trained_state(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"only in the model: \['0.bias', '0.weight'\]"):
        state.load_trained_state(nn.Sequential(nn.Linear(3, 2)), kept)
    with pytest.raises(ValueError, match=r"training state weight: expected shape \[2, 4\], got \[2, 3\]"):
        state.load_trained_state(nn.Linear(4, 2), kept)


def test_publishing_leaves_the_latest_complete_state_alone(tmp_path: Path):
    for epoch in (1, 2):
        state.write_part(state.unfinished(tmp_path, epoch), "run", {"epoch": epoch})
        state.publish(tmp_path, epoch)
    state.write_part(state.unfinished(tmp_path, 3), "run", {"epoch": 3})  # killed before it was published
    (tmp_path / "epoch-0002.bak").mkdir()  # a user's copy
    ((done, path),) = state.published(tmp_path)
    assert done == 2
    assert state.read_part(path, "run") == {"epoch": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0002", "epoch-0002.bak", "partial-epoch-0003"]


def test_an_epoch_that_was_done_again_takes_the_place_of_a_damaged_one(tmp_path: Path):
    for said in ("damaged", "whole"):
        state.write_part(state.unfinished(tmp_path, 3), "run", {"said": said})
        path = state.publish(tmp_path, 3)
    assert state.read_part(path, "run") == {"said": "whole"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_part_is_named(tmp_path: Path):
    state.write_part(tmp_path, "process-0", {})
    with pytest.raises(FileNotFoundError, match="no part 'process-1'; was it saved by fewer processes"):
        state.read_part(tmp_path, "process-1")
    assert state.published(tmp_path / "nothing") == []
    assert state.read_newest(tmp_path / "nothing", ["run"], pytest.fail) == (0, {})


@pytest.mark.parametrize("name", ["run.tensors.safetensors", "run.state.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_cut_short_is_named_and_an_older_state_stands_in(name: str, share: float, tmp_path: Path):
    root = tmp_path / "state"
    for epoch in (9, 10):
        state.write_part(root / f"epoch-{epoch:04d}", "run", {"epoch": torch.tensor(epoch)})
    assert state.read_newest(root, ["run"], pytest.fail) == (10, {"run": {"epoch": torch.tensor(10)}})
    cut = [root / f"epoch-{epoch:04d}" / name for epoch in (10, 9)]
    said: list[str] = []
    cut[0].write_bytes(cut[0].read_bytes()[: int(share * cut[0].stat().st_size)])
    assert state.read_newest(root, ["run"], said.append) == (9, {"run": {"epoch": torch.tensor(9)}})
    assert said[0].startswith(f"warning: training state {cut[0]}: damaged: ")
    cut[1].unlink() if name.endswith("safetensors") else cut[1].write_text("[]")
    with pytest.raises(state.StateError, match=r"damaged: .*; there is no older one\. The weights of the last epoch"):
        state.read_newest(root, ["run"], said.append)
