from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosa_kernels.peft import MoSAConfig
from mosa_kernels.peft.config import METHODS
from mosa_kernels.peft.styles import STYLES


def test_defaults_of_a_style_fill_what_is_none() -> None:
    full = MoSAConfig().resolved()
    assert (full.activation, full.scale, full.norm) == ("gelu", 0.1, True)
    full = MoSAConfig(style="houlsby", scale=0.0, norm=True).resolved()
    assert (full.activation, full.scale, full.norm) == ("silu", 0.0, True)


@given(
    st.builds(
        MoSAConfig,
        style=st.sampled_from(sorted(set(STYLES) - {"lora"})),
        mode=st.sampled_from(("dense", "mosa")),
        bottleneck=st.integers(1, 300),
        num_experts=st.integers(1, 255)
        | st.lists(st.integers(1, 255), min_size=1, max_size=3).map(tuple)
        | st.tuples(st.integers(1, 255), st.integers(1, 255)).map("{0[0]}:{0[1]}".format),
        scale=st.none() | st.floats(-1, 1),
        norm=st.none() | st.booleans(),
        expert_scale=st.just("N") | st.floats(0.1, 4),
        dropout=st.floats(0, 0.9) | st.lists(st.floats(0, 0.9), min_size=1, max_size=3) | st.just("0:0.3"),
        layers=st.none() | st.lists(st.integers(-12, 11), min_size=1, unique=True),
        seed=st.integers(0, 2**40),
        sparse=st.sampled_from(("up", "down", "both", "none")),
        method=st.sampled_from(METHODS),
        prompt_length=st.integers(1, 100),
    )
)
def test_json_keeps_every_field(config: MoSAConfig) -> None:
    assert MoSAConfig.from_json(config.to_json()) == config


def test_json_refuses_what_it_does_not_know() -> None:
    values = {**MoSAConfig().to_dict(), "bottelneck": 8}
    with pytest.raises(ValueError, match="'bottelneck': no such option"):
        MoSAConfig.from_json(json.dumps(values))
    for text in ("{", "[1]"):
        with pytest.raises(ValueError, match="JSON"):
            MoSAConfig.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("style", "prefix", "adaptformer, pfeiffer, houlsby, lora"),
        ("mode", "sparse", "dense, pruned, mosa"),
        ("bottleneck", 0, "at least 1"),
        ("bottleneck", 8.0, "whole number"),
        ("bottleneck", True, "whole number"),
        ("num_experts", 256, "at most 255"),
        ("num_experts", [4, 0], "at least 1"),
        ("num_experts", [], "one for each block"),
        ("num_experts", torch.tensor(4), "a whole number, got tensor(4)"),
        ("num_experts", "4", "the first and the last as '1:4', got '4'"),
        ("num_experts", "1:", "the first and the last"),
        ("num_experts", "-1:4", "the first and the last"),
        ("num_experts", "0:4", "at least 1"),
        ("num_experts", "1:256", "at most 255"),
        ("lora_targets", ["q", "qkv"], "some of q, k, v, proj"),
        ("lora_targets", ["q", "q"], "each once"),
        ("lora_targets", [], "some of q, k, v, proj"),
        ("lora_targets", 3, "some of q, k, v, proj"),
        ("method", "vpt", "adapter, full, linear, bitfit, vpt-shallow, vpt-deep"),
        ("prompt_length", 0, "at least 1"),
        ("activation", "tanh", "gelu"),
        ("scale", "big", "a number"),
        ("scale", float("nan"), "finite"),
        ("norm", 1, "True, False or None"),
        ("dropout", 1.0, "0 <= p < 1"),
        ("dropout", [0.1, -0.1], "0 <= p < 1, got -0.1"),
        ("dropout", "0:1", "0 <= p < 1, got 1.0"),
        ("dropout", "nan:0.1", "0 <= p < 1, got nan"),
        ("dropout", [], "one for each block"),
        ("dropout", "0.1", "the first and the last as '0:0.3', got '0.1'"),
        ("dropout", "0:0.1:0.2", "the first and the last"),
        ("dropout", None, "0 <= p < 1, got None"),
        ("sparse", "half", "up, down, both, none"),
        ("granularity", "entry", "element"),
        ("expert_bias", 1, "True or False"),
        ("merge_rule", "sum", "mean, jigsaw"),
        ("expert_per", "token", "sample, batch"),
        ("expert_scale", "M", "a number or 'N'"),
        ("anchored", None, "True or False"),
        ("layers", "all", "list of block indices"),
        ("layers", torch.tensor(4), "list of block indices"),
        ("layers", [], "at least one"),
        ("layers", [1, 1], "each block once"),
        ("layers", [1.5], "whole numbers"),
        ("seed", 1.5, "whole number"),
        ("seed", 2**80, "whole number of 64 bits"),
    ],
)
def test_each_error_names_field_expected_and_got(field: str, value: object, expected: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        MoSAConfig(**{field: value})  # type: ignore[arg-type]
    message = str(raised.value)
    assert message.startswith(f"{field}: expected")
    assert expected in message


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="num_experts: expected at least 2 for mode 'pruned'"):
        MoSAConfig(mode="pruned", num_experts=1)
    with pytest.raises(ValueError, match="num_experts: expected at least 2 for mode 'pruned', got 1:4"):
        MoSAConfig(mode="pruned", num_experts="1:4")
    with pytest.raises(ValueError, match="anchored: expected False for mode 'dense'"):
        MoSAConfig(mode="dense", anchored=True)
    with pytest.raises(ValueError, match="anchored: expected False for sparse 'none'"):
        MoSAConfig(sparse="none", anchored=True)
    for one in (1, (1, 1), "1:1"):
        with pytest.raises(ValueError, match=r"anchored: expected False for num_experts .*1.*, which has no experts"):
            MoSAConfig(num_experts=one, anchored=True)  # type: ignore[arg-type]
    assert MoSAConfig(num_experts="1:4", anchored=True).anchored
    with pytest.raises(ValueError, match="sparse: expected up, down or both for mode 'pruned'"):
        MoSAConfig(mode="pruned", sparse="none")
    with pytest.raises(ValueError, match="num_experts: expected at least 2 for mode 'pruned'"):
        MoSAConfig(mode="pruned", num_experts=(4, 1))
    with pytest.raises(ValueError, match="activation: expected None or identity for style 'lora'"):
        MoSAConfig(style="lora", activation="gelu")
    with pytest.raises(ValueError, match="norm: expected None or False for style 'lora'"):
        MoSAConfig(style="lora", norm=True)


def test_targets_have_one_order() -> None:
    assert MoSAConfig(lora_targets=["proj", "q"]).lora_targets == ("q", "proj")  # type: ignore[arg-type]
    assert MoSAConfig(style="lora", lora_targets=("v", "k")).sites == ("k", "v")
    assert MoSAConfig(style="houlsby", method="bitfit").sites == ()


def test_experts_of_each_block() -> None:
    assert MoSAConfig(num_experts=3).experts_of(2) == [3, 3]
    assert MoSAConfig(num_experts=[3, 1]).experts_of(2) == [3, 1]  # type: ignore[arg-type]
    assert MoSAConfig(num_experts=3, mode="dense").experts_of(2) == [1, 1]
    assert MoSAConfig(num_experts=3, sparse="none").experts_of(2) == [1, 1]
    assert MoSAConfig(num_experts="1:4").experts_of(4) == [1, 2, 3, 4]
    assert MoSAConfig(num_experts="1:4").experts_of(12) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert MoSAConfig(num_experts="1:4").experts_of(6) == [1, 1, 2, 3, 3, 4]
    assert MoSAConfig(num_experts="1:4").experts_of(2) == [1, 3]
    assert MoSAConfig(num_experts="3:1").experts_of(3) == [3, 2, 1]
    assert MoSAConfig(num_experts="2:2").experts_of(2) == [2, 2]
    assert MoSAConfig(num_experts="1:4", mode="dense").experts_of(2) == [1, 1]
    with pytest.raises(ValueError, match=r"num_experts: expected one number, or one for each of the 3 blocks .* got 2"):
        MoSAConfig(num_experts=(3, 1)).experts_of(3)


def test_dropout_of_each_block() -> None:
    assert MoSAConfig(dropout=0.2).dropout_of(3) == [0.2, 0.2, 0.2]
    assert MoSAConfig(dropout=[0.2, 0]).dropout_of(2) == [0.2, 0]  # type: ignore[arg-type]
    assert MoSAConfig(dropout="0:0.3").dropout_of(4) == [0, 0.1, 0.2, 0.3]
    assert MoSAConfig(dropout="0.4:0.1").dropout_of(3) == [0.4, 0.25, 0.1]
    assert MoSAConfig(dropout="0.1:0.2").dropout_of(1) == [0.1]
    with pytest.raises(ValueError, match=r"dropout: expected one number, or one for each of the 3 blocks, got 2: \[0"):
        MoSAConfig(dropout=(0, 0.1)).dropout_of(3)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoSAConfig().bottleneck = 8  # type: ignore[misc]
    assert MoSAConfig(layers=[0, -1]).layers == (0, -1)  # type: ignore[arg-type]
