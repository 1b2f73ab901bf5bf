"""What the host derives from a call before it launches: sizes, flags and the row of the table."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.dropout import drop_threshold
from mosa_kernels.backends.triton.configs import Configs, configs, padded

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Plan(NamedTuple):
    """What forward and backward of one call share."""

    tokens: int
    padded_bottleneck: int
    experts: bool  # whether an expert id in device memory has to be read
    grouped: bool  # whether tokens may differ in their expert
    expert_group: int  # tokens that share an expert
    seed_group: int  # tokens that share a dropout seed
    threshold: int  # of the dropout draw
    keep_scale: float  # 1 / (1 - p)
    bias_rows: int  # rows of b_up, 0 for a shared bias
    centre: bool  # whether the matrix units see x less its mean: where it is converted or rounded to TF32 anyway
    dtype: tl.dtype  # of the operands of the matrix products
    precision: str  # of float32 products
    configs: Configs


def plan_of(args: AdapterArguments, arch: int) -> Plan:
    tokens = args.x.numel() // args.width
    expert, seed, b_up = args.expert, args.seed, args.b_up
    experts = expert is not None and args.has_experts
    groups = expert.numel() if expert is not None else 1
    dropout = args.dropout_p > 0
    dtype = args.matmul_dtype
    return Plan(
        tokens=tokens,
        padded_bottleneck=padded(args.bottleneck),
        experts=experts,
        grouped=experts and groups > 1,
        expert_group=tokens // groups,
        seed_group=tokens // seed.numel() if seed is not None else tokens,
        threshold=drop_threshold(args.dropout_p) if dropout else 0,
        keep_scale=1 / (1 - args.dropout_p),
        bias_rows=b_up.shape[0] if b_up is not None and b_up.dim() == 2 else 0,
        centre=args.x.dtype == torch.float32,
        dtype=_DTYPES[dtype],
        precision=float32_precision() if dtype == torch.float32 else "tf32",
        configs=configs(args.width, args.bottleneck, dtype, arch),
    )


def float32_precision() -> str:
    """Three TF32 products keep what a float32 product has; one where PyTorch's own products may use TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@cache
def architecture(device: torch.device) -> int:
    """10 times the compute capability; 80 for tensors on the CPU, which the interpreter runs."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def rows_of(x: Tensor) -> Tensor:
    """x as [T, d] with neighbouring columns, a view where its strides allow it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
