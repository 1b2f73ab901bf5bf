"""Blocks written out by hand in float64: attention, FFN, and the adapter where AdaptFormer has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm_models import SWIN, VIT, family_of, images, make, train_a_little
from torch import Tensor, nn

from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.sampler import inference_experts
from mosa_kernels.peft import MoSAConfig, inject_adapter


def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def adapter_by_hand(adapter: FusedMoSAAdapter, x: Tensor, expert: int | None, scale: float) -> Tensor:
    assert adapter.norm is not None
    z = F.gelu(norm(adapter.norm, x) @ adapter.down.weight.T + adapter.down.bias)
    if expert is None:
        return scale * (z @ adapter.up.weight.T / adapter.num_experts + adapter.up.bias.mean(0))
    return scale * (z @ (adapter.up.weight * (adapter.up.assignment == expert)).T + adapter.up.bias[expert])


def attention(module: nn.Module, x: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """x [B, L, d]"""
    batch, length, width = x.shape
    qkv = (x @ module.qkv.weight.T + module.qkv.bias).reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = ((qkv[0] @ qkv[1].transpose(-1, -2)) * (width / heads) ** -0.5 + bias).softmax(-1)
    return module.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, length, width))


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    return F.gelu(x @ module.fc1.weight.T + module.fc1.bias) @ module.fc2.weight.T + module.fc2.bias


def prepared(model: nn.Module) -> nn.Module:
    inject_adapter(model.double(), MoSAConfig(bottleneck=4))
    train_a_little(model)
    return model


@pytest.mark.parametrize("expert", [None, 0, 3])
@torch.no_grad()
def test_vit_block(expert: int | None) -> None:
    model = prepared(make(family_of("deit3")))
    block = model.blocks[1]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    stream = x + block.ls1.gamma * attention(block.attn, norm(block.norm1, x), heads=3)
    ffn = block.ls2.gamma * mlp(block.mlp, norm(block.norm2, stream))
    expected = stream + ffn + adapter_by_hand(block.mosa["default"]["parallel_ffn"], stream, expert, scale=0.1)
    with inference_experts(model, expert):
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def with_adapter(block: Any, stream: Tensor, ffn: Tensor) -> Tensor:
    """What a block hands on whose merged adapter runs beside the FFN."""
    return stream + ffn + adapter_by_hand(block.mosa["default"]["parallel_ffn"], stream, None, scale=0.1)


@torch.no_grad()
def test_swin_block() -> None:
    model = prepared(make(SWIN))
    block = model.layers[1].blocks[0]  # windows of 2 x 2, not shifted
    x = torch.randn(2, 4, 4, 32, dtype=torch.float64)
    windows = norm(block.norm1, x).reshape(2, 2, 2, 2, 2, 32).transpose(2, 3).reshape(8, 4, 32)
    bias = block.attn.relative_position_bias_table[block.attn.relative_position_index.reshape(-1)]
    attended = attention(block.attn, windows, 2, bias.reshape(4, 4, 2).permute(2, 0, 1))
    stream = x + attended.reshape(2, 2, 2, 2, 2, 32).transpose(2, 3).reshape(2, 4, 4, 32)
    ffn = mlp(block.mlp, norm(block.norm2, stream))
    expected = with_adapter(block, stream, ffn)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_where_the_norm_comes_after_the_ffn_the_adapter_takes_the_ffns_input() -> None:
    model = prepared(make(family_of("swinv2_tiny")))
    block = model.layers[0].blocks[1]
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    stream = x + norm(block.norm1, block._attn(x))
    ffn = norm(block.norm2, mlp(block.mlp, stream))
    expected = with_adapter(block, stream, ffn)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_norm_on_the_main_branch_comes_after_the_adapter() -> None:
    model = prepared(make(family_of("swinv2_cr_giant"), extra_norm_period=1))
    block = model.stages[0].blocks[0]
    assert isinstance(block.norm3, nn.LayerNorm)
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    stream = x + norm(block.norm1, block._shifted_window_attn(x))
    ffn = norm(block.norm2, mlp(block.mlp, stream))
    adapter = block.mosa["default"]["parallel_ffn"]
    expected = norm(block.norm3, stream + ffn + adapter_by_hand(adapter, stream, None, scale=0.1))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_where_attention_widens_and_pools_the_tokens_the_adapter_takes_what_comes_out() -> None:
    model = prepared(make(family_of("hiera")))
    block = model.blocks[1]
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    wide = norm(block.norm1, x) @ block.proj.weight.T + block.proj.bias
    stream = wide.reshape(2, 4, 16, 32).amax(1) + block.attn(norm(block.norm1, x))
    ffn = mlp(block.mlp, norm(block.norm2, stream))
    expected = with_adapter(block, stream, ffn)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_blocks_of_the_class_token_have_an_adapter_on_it() -> None:
    model = prepared(make(family_of("cait")))
    block = model.blocks_token_only[0]
    x, token = torch.randn(2, 4, 48, dtype=torch.float64), torch.randn(2, 1, 48, dtype=torch.float64)
    stream = token + block.gamma_1 * block.attn(norm(block.norm1, torch.cat([token, x], 1)))
    ffn = block.gamma_2 * mlp(block.mlp, norm(block.norm2, stream))
    expected = with_adapter(block, stream, ffn)
    torch.testing.assert_close(block(x, token), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_of_blocks_that_hand_on_more_the_tokens_have_the_adapter() -> None:
    model = prepared(make(family_of("mvitv2")))
    block = model.stages[1].blocks[0]
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    shortcut = norm(block.norm1, x) @ block.shortcut_proj_attn.weight.T + block.shortcut_proj_attn.bias
    grid = F.max_pool2d(shortcut.transpose(1, 2).reshape(2, 32, 8, 8), 3, 2, 1)
    stream = grid.flatten(2).transpose(1, 2) + block.attn(norm(block.norm1, x), [8, 8])[0]
    ffn = mlp(block.mlp, norm(block.norm2, stream))
    expected = with_adapter(block, stream, ffn)
    out, size = block(x, [8, 8])
    assert list(size) == [4, 4]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("style", ["pfeiffer", "houlsby"])
@torch.no_grad()
def test_sequential_styles(style: str) -> None:
    model = make(VIT).double()
    inject_adapter(model, MoSAConfig(style=style, mode="dense", bottleneck=4, norm=True, activation="gelu"))
    train_a_little(model)
    block = model.blocks[0]
    sites = block.mosa["default"]

    def passed_through(site: str, y: Tensor) -> Tensor:
        if site not in sites:
            return y
        adapter = sites[site]
        z = F.gelu(norm(adapter.norm, y) @ adapter.down.weight.T + adapter.down.bias)
        return y + z @ adapter.up.weight.T + adapter.up.bias

    x = torch.randn(2, 5, 48, dtype=torch.float64)
    stream = x + passed_through("after_attention", attention(block.attn, norm(block.norm1, x), heads=3))
    expected = stream + passed_through("after_ffn", mlp(block.mlp, norm(block.norm2, stream)))
    assert ("after_attention" in sites) == (style == "houlsby")
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_extra_arguments_reach_the_block() -> None:
    model = prepared(make())
    block = model.blocks[0]
    x = images().double().flatten()[: 2 * 5 * 48].reshape(2, 5, 48)
    mask = torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1)
    assert not torch.allclose(block(x, attn_mask=mask), block(x))
