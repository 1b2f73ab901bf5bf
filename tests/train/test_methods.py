"""Every method by its name on the command line: what it puts in, and a short run from training to reopened weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm_models import images, make

from mosa_kernels.data.backbone import OFFLINE_BACKBONE
from mosa_kernels.peft import MoSAConfig, inject_adapter, save_adapter
from mosa_kernels.peft.book import book_of, find_book
from mosa_kernels.train import job as job_module
from mosa_kernels.train.backbones import create_backbone
from mosa_kernels.train.job import Job
from mosa_kernels.train.methods import METHODS, AdapterOptions, adapt, find_method, make_optimizer, method_of
from mosa_kernels.train.progress import Reporter
from mosa_kernels.train.recipe import make_recipe
from mosa_kernels.train.saved import open_saved
from mosa_kernels.train.schedule import Schedule
from mosa_kernels.train.settings import Settings
from mosa_kernels.train.state import trained_state

SHORT = {"epochs": 1, "warmup_epochs": 0.0, "augment": "none", "align": "none", "beta": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run_is_reopened_as_it_was(
    method: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "plot_curve", lambda *_: None)  # half of the time of a run this short
    settings = tiny(method=method, adapter=AdapterOptions(bottleneck=4, num_experts=2, prompt_length=2), **SHORT)
    run = tmp_path / "run"
    job = Job(settings, run, False, Reporter())
    result = job.run()
    assert result["method"] == method
    assert result["reported"] == ("mean" if method in ("mosa", "mosl") else "plain")
    record = json.loads((run / "config.json").read_text())
    assert Settings.from_dict(record["settings"]) == settings
    trained = sum(p.numel() for p in job.prepared.model.parameters() if p.requires_grad)
    assert result["parameters"]["trained"] <= trained
    assert (result["parameters"]["trained"] == trained) == (find_method(method).mode != "pruned")
    saved = open_saved(run)
    ours, theirs = trained_state(job.prepared.model), trained_state(saved.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(job.prepared.model.eval().cpu()(x), saved.model(x))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "linear"])
def test_a_configuration_says_by_which_method_it_was_made(method: str) -> None:
    config = adapt(make(), find_method(method), AdapterOptions(bottleneck=4), make_recipe("paper"), 0)
    assert config is not None
    assert method_of(config).name == method


def test_an_adapter_alone_is_opened_as_it_was_configured(tmp_path: Path) -> None:
    model = create_backbone(OFFLINE_BACKBONE, 3)
    inject_adapter(model, MoSAConfig(style="lora", bottleneck=4, merge_rule="jigsaw"))
    save_adapter(model, tmp_path)
    settings = open_saved(tmp_path).settings
    assert (settings.method, settings.recipe.merge_rule) == ("mosl", "jigsaw")


@pytest.mark.parametrize(
    ("method", "style", "mode", "bottleneck"),
    [
        ("adaptformer", "adaptformer", "dense", 64),
        ("sparseadapter", "adaptformer", "pruned", 64),
        ("mosa", "adaptformer", "mosa", 64),
        ("pfeiffer", "pfeiffer", "dense", 64),
        ("houlsby", "houlsby", "dense", 64),
        ("lora", "lora", "dense", 16),
        ("sparselora", "lora", "pruned", 16),
        ("mosl", "lora", "mosa", 16),
    ],
)
def test_what_a_method_puts_in(method: str, style: str, mode: str, bottleneck: int) -> None:
    model = make()
    recipe = make_recipe("paper", dropout=0.1)
    config = adapt(model, find_method(method), AdapterOptions(lora_targets=("q", "k")), recipe, 7)
    assert config is not None
    assert (config.style, config.mode, config.bottleneck) == (style, mode, bottleneck)
    assert (config.seed, config.dropout, config.expert_per, config.lora_targets) == (7, 0.1, "batch", ("q", "k"))
    assert find_method(method).passes == (2 if mode == "mosa" else 1)
    assert config.to_dict() == book_of(model).configs["default"].to_dict()


@pytest.mark.parametrize("method", ["full", "bitfit", "vpt-shallow", "vpt-deep"])
def test_baselines_take_their_own_options(method: str) -> None:
    model = make()
    options = AdapterOptions(bottleneck=3, layers=(1,) if method.startswith("vpt") else None, prompt_length=5)
    config = adapt(model, find_method(method), options, make_recipe("paper", dropout=0.1), 7)
    assert config is not None
    assert (config.method, config.prompt_length, config.seed) == (method, 5, 7)
    assert model(images()).shape == (2, 10)
    assert find_method(method).complete(options) == options


def test_linear_probing_leaves_no_trace() -> None:
    model = make()
    assert adapt(model, find_method("linear"), AdapterOptions(), make_recipe("paper"), 0) is None
    assert find_book(model) is None
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_styles_and_methods() -> None:
    sparse = find_method("sparseadapter").complete(AdapterOptions(style="houlsby", bottleneck=8))
    assert (sparse.style, sparse.bottleneck) == ("houlsby", 8)
    assert find_method("mosa").complete(AdapterOptions(style="lora")).bottleneck == 16
    with pytest.raises(ValueError, match="style: method 'mosl' has style 'lora', got 'pfeiffer'"):
        find_method("mosl").complete(AdapterOptions(style="pfeiffer"))
    with pytest.raises(ValueError, match="expected at least 1"):
        adapt(make(), find_method("lora"), AdapterOptions(bottleneck=0), make_recipe("paper"), 0)
    with pytest.raises(ValueError, match=r"method: expected one of .*, got 'vpt'"):
        find_method("vpt")


def test_options_survive_json() -> None:
    options = AdapterOptions(num_experts=(2, 3), layers=(0, 1), lora_targets=("k",), prompt_length=4)
    assert AdapterOptions(**json.loads(json.dumps(dataclasses.asdict(options)))) == options


def test_experts_have_a_learning_rate_of_their_own() -> None:
    torch.manual_seed(0)
    recipe = make_recipe(lr=0.01, epochs=4, warmup_epochs=1, expert_lr=4.0)
    model = create_backbone("vit_offline_patch8_32", 10)
    adapt(model, find_method("mosa"), AdapterOptions(bottleneck=8), recipe, seed=0)
    optimizer = make_optimizer(model, recipe, "mosa")
    rest, experts = optimizer.param_groups
    up = {p for name, p in model.named_parameters() if p.requires_grad and ".up." in name}
    assert set(experts["params"]) == up
    assert len(up) == 2 * 4  # weight and bias of each of four blocks
    assert {*rest["params"], *up} == {p for p in model.parameters() if p.requires_grad}
    schedule = Schedule(optimizer, recipe, updates_per_epoch=5)
    for update in (3, 5, 11, 19):
        schedule.set(update)
        assert experts["lr"] == pytest.approx(4 * rest["lr"])
    assert rest["lr"] < 0.01
    assert len(make_optimizer(model, make_recipe(lr=0.01), "mosa").param_groups) == 1
    for kind, of in (("adamw", model), ("mosa", torch.nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="expert_lr: needs experts and the optimizer mosa"):
            make_optimizer(of, recipe, kind)
    with pytest.raises(ValueError, match="expert_lr: expected a positive number, got 0"):
        make_recipe(expert_lr=0)
