"""Several tasks in one adapter: the whole comparison in small, and what the runs rest on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from script_modules import load_script

import mosa_kernels as mk
from mosa_kernels.data.backbone import load_offline_backbone

multitask = load_script("benchmarks/multitask.py")


def compare(output: Path, **changes: object) -> dict:
    """A comparison in small, in this process."""
    options = {
        "model": multitask.OFFLINE_BACKBONE,
        "task": ["offline:count", "offline:location"],
        "variant": ["shared"],
        "bottleneck": 4,
        "updates": 10,
        "rate": [0.01],
        "scale": None,
        "seeds": 1,
        "tuning_seeds": 1,
        "workers": 1,
    }
    multitask.main(output, **{**options, **changes})
    return json.loads((output / "multitask.json").read_text())


def test_a_comparison_is_written_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    record = compare(tmp_path)
    assert set(record["measured"]) == {"shared", "mosa"}
    for runs in record["measured"].values():
        assert len(runs) == 1
        for accuracies in runs:
            mean = (accuracies["offline:count"] + accuracies["offline:location"]) / 2
            assert accuracies["mean"] == pytest.approx(mean)
            assert 0 < mean < 100
    (difference,) = record["differences"]
    pairs = zip(record["measured"]["mosa"], record["measured"]["shared"], strict=True)
    assert difference["points"] == pytest.approx([a["mean"] - b["mean"] for a, b in pairs])
    assert "MoSA, an expert for each task" in (tmp_path / "multitask.md").read_text()
    assert (tmp_path / "multitask.png").stat().st_size > 1000

    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 2 + 2
    changed = json.loads(cells[0].read_text())
    changed["accuracies"]["mean"] = 12.5
    cells[0].write_text(json.dumps(changed))
    record = compare(tmp_path)
    values = [a["mean"] for runs in record["measured"].values() for a in runs]
    values += [value for by_lr in record["tried"].values() for each in by_lr.values() for value in each]
    assert 12.5 in values  # read, not run again


def test_a_scale_is_chosen_beside_the_learning_rate(tmp_path: Path) -> None:
    record = compare(tmp_path, scale=[0.1, 3.0])
    labels = ["0.01, scale 0.1", "0.01, scale 3"]
    for key, tried in record["tried"].items():
        assert list(tried) == labels
        assert tried[labels[0]] != tried[labels[1]]  # it reaches the adapters
        assert record["chosen"][key] == max(labels, key=lambda label: tried[label][0])
    page = (tmp_path / "multitask.md").read_text()
    assert "and the scale of the adapters from 0.1, 3 by" in page
    repeats = (
        "python benchmarks/multitask.py OUTPUT --task offline:count --task offline:location --variant shared "
        "--bottleneck 4 --updates 10 --rate 0.01 --scale 0.1 --scale 3.0 --seeds 1 --tuning-seeds 1"
    )
    assert f"`{repeats}`, " in page
    assert record["command"] == repeats
    run = multitask.Run(multitask.variants(2)[0], "model", ("a", "b"), 4, 10, 0.01, 0, False)
    assert run.path(tmp_path) != multitask.replace(run, scale=0.1).path(tmp_path)


def test_wrong_words_are_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"expected some of shared, .* got best"):
        compare(tmp_path, variant=["best"])
    with pytest.raises(typer.BadParameter, match="expected at least two different tasks, got offline:count"):
        compare(tmp_path, task=["offline:count"])


def test_storage_is_what_the_titles_say() -> None:
    sizes = {}
    for variant in multitask.variants(4):
        adapter = dict(variant.adapter)
        backbone = load_offline_backbone(num_classes=0)
        wide = adapter.pop("wide", 1)
        mk.inject_adapter(backbone, mk.MoSAConfig(bottleneck=8 * wide, **adapter))
        sizes[variant.key] = multitask.stored(multitask.Tasks(backbone, [2, 3]))
    norm, width, depth = 2 * 128, 128, 4
    assert sizes["shared"] == depth * (norm + 8 * width + 8 + width * 8 + width)
    assert sizes["dropout"] == sizes["dropout-two-pass"] == sizes["mosa-one-bias"] == sizes["shared"]
    assert sizes["narrow"] == sizes["mosa"] == sizes["shared"] + depth * 3 * width
    assert sizes["separate"] == depth * (norm + 4 * (8 * width + 8 + width * 8 + width))


def test_tasks_with_experts_of_their_own_do_not_move_each_other() -> None:
    backbone = load_offline_backbone(num_classes=0)
    adapter = dict(multitask.variants(2)[4].adapter)
    mk.inject_adapter(backbone, mk.MoSAConfig(bottleneck=4, **adapter))
    model = multitask.Tasks(backbone, [3, 3]).train()
    images, labels = torch.randn(4, 3, 32, 32), [torch.tensor([0, 1]), torch.tensor([2, 0])]
    layer = next(module for module in backbone.modules() if isinstance(module, mk.FusedMoSAAdapter))
    losses = multitask.objective(model, images, labels, torch.tensor([0, 0, 1, 1]), 1)
    (both,) = torch.autograd.grad(losses, layer.up.weight)
    alone = multitask.objective(model, images[:2], labels[:1], torch.tensor([0, 0]), 1) / 2
    (first,) = torch.autograd.grad(alone, layer.up.weight)
    own = layer.up.assignment == 0
    assert first[own].ne(0).any()
    torch.testing.assert_close(both[own], first[own], rtol=1e-4, atol=1e-7)
