"""Weights that experts are merged by: what they mean, that they are fitted, and the comparison in small."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from script_modules import load_script

import mosa_kernels as mk
from mosa_kernels.data.backbone import load_offline_backbone
from mosa_kernels.nn.projection import Projection

merge_weights = load_script("benchmarks/merge_weights.py")

TASK = "digits, 10 labels a class"


def model_of(sparse: str = "up") -> torch.nn.Module:
    torch.manual_seed(0)
    model = load_offline_backbone(4)
    mk.inject_adapter(model, mk.MoSAConfig(bottleneck=4, num_experts=3, sparse=sparse, scale=1.0))
    for module in model.modules():
        if isinstance(module, Projection):
            torch.nn.init.normal_(module.weight, std=0.1)
            torch.nn.init.normal_(module.bias, std=0.1)
    return model.eval()


@pytest.mark.parametrize("sparse", ["up", "both"])
def test_weights_multiply_what_an_expert_has_learned(sparse: str) -> None:
    model, images = model_of(sparse), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mean = model(images)
        torch.testing.assert_close(merge_weights.Weighted(model, torch.ones(3))(images), mean)
        found = merge_weights.Weighted(model, torch.tensor([0.5, 2.0, -1.0]))(images)
        for module in model.modules():
            if not isinstance(module, Projection) or module.activity is None:
                continue
            for expert, weight in enumerate((0.5, 2.0, -1.0)):
                if module.assignment is not None:
                    start = torch.zeros_like(module.weight) if module.initial is None else module.initial
                    mine = module.assignment == expert
                    module.weight[mine] = (start + weight * (module.weight - start))[mine]
                if module.bias.dim() == 2:
                    module.bias[expert] *= weight
        torch.testing.assert_close(found, model(images))
        assert (found - mean).abs().max() > 1e-3


def test_what_is_fitted_is_likelier_than_the_mean() -> None:
    model = model_of()
    images = torch.randn(24, 3, 32, 32)
    with torch.no_grad():  # labels of a model in which one expert says nothing and another more
        labels = merge_weights.Weighted(model, torch.tensor([0.0, 1.0, 2.5]))(images).argmax(1)
    batches = list(zip(images.split(10), labels.split(10), strict=True))

    def nll(weights: torch.Tensor) -> float:
        with torch.no_grad():
            return F.cross_entropy(merge_weights.Weighted(model, weights)(images), labels).item()

    weights = merge_weights.fitted_weights(model, batches)
    assert nll(weights) < nll(torch.ones(3)) - 0.01
    for step in (-0.05, 0.05):
        for expert in range(3):
            moved = weights.clone()
            moved[expert] += step
            assert nll(moved) > nll(weights) - 1e-4
    factor = merge_weights.best_factor(model, batches)
    assert nll(torch.full((3,), factor)) == min(nll(torch.full((3,), each)) for each in merge_weights.FACTORS)


def test_a_comparison_is_written_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(merge_weights, "STEPS", 2)
    monkeypatch.setattr(merge_weights, "FACTORS", (1.0, 2.0))
    options = {"task": [TASK], "bottleneck": 4, "epochs": 1, "seeds": 1, "workers": 1}
    merge_weights.main(tmp_path, **options)
    record = json.loads((tmp_path / "merge_weights.json").read_text())
    assert list(record["measured"]) == [f"{a}-{b}" for a in ("sample", "scaled") for b in ("mean", "weights", "factor")]
    assert len(record["fitted"]["sample"][0]["weights"]) == 4
    repeats = f"merge_weights.py OUTPUT --task {shlex.quote(TASK)} --bottleneck 4 --epochs 1 --seeds 1"
    assert record["command"] == f"python benchmarks/{repeats}"
    assert f"`{record['command']}`, " in (tmp_path / "merge_weights.md").read_text()
    pairs = {(each["better"], each["worse"]) for each in record["differences"]}
    assert len(pairs) == 4
    assert (tmp_path / "merge_weights.png").stat().st_size > 1000

    (cell,) = (tmp_path / "cells").glob("scaled-*.json")
    changed = json.loads(cell.read_text())
    changed["measured"]["weights"]["accuracy"] = 12.5
    cell.write_text(json.dumps(changed))
    merge_weights.main(tmp_path, **options)
    again = json.loads((tmp_path / "merge_weights.json").read_text())
    assert again["measured"]["scaled-weights"][TASK] == [12.5]  # read, not run again
    assert "merged by a weight for each expert" in (tmp_path / "merge_weights.md").read_text()


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(typer.BadParameter, match=r"expected some of digits, .* got cats"):
        merge_weights.table_with("ours-2", ["cats"], None)
