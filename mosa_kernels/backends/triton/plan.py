"""What the host derives from a call before it launches: sizes, flags and the row of the table."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterNeeds
from mosa_kernels.backends.dropout import drop_threshold
from mosa_kernels.backends.triton import configs as table
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
    raw: bool  # whether the weight gradients multiply x as it lies in memory: bf16 alone has the range for da * rstd
    served: str  # whose tokens the launches over tokens serve: "all", "experts" (by their lists) or "merged"
    lists: int  # experts that have a list of units, 0 without lists
    units: int  # that are multiplied at a time: in a list, else the padded bottleneck
    dtype: tl.dtype  # of the operands of the matrix products
    precision: str  # of float32 products
    configs: Configs


def plan_of(args: AdapterArguments, arch: int, lists: Tensor | None = None, served: str = "all") -> Plan:
    """`lists`: the units of each expert (`adapter_units`), or None."""
    tokens = args.x.numel() // args.width
    expert, seed, b_up = args.expert, args.seed, args.b_up
    experts = expert is not None and args.has_experts
    groups = expert.numel() if expert is not None else 1
    dropout = args.dropout_p > 0
    dtype = args.matmul_dtype
    block_r = padded(args.bottleneck)
    units = block_r if lists is None else lists.shape[1]
    return Plan(
        tokens=tokens,
        padded_bottleneck=block_r,
        experts=experts,
        grouped=experts and groups > 1,
        expert_group=tokens // groups,
        seed_group=tokens // seed.numel() if seed is not None else tokens,
        threshold=drop_threshold(args.dropout_p) if dropout else 0,
        keep_scale=1 / (1 - args.dropout_p),
        bias_rows=b_up.shape[0] if b_up is not None and b_up.dim() == 2 else 0,
        centre=args.x.dtype == torch.float32 or args.x.dtype != dtype,
        raw=args.norm_weight is not None and dtype == args.x.dtype == torch.bfloat16,
        served=served,
        lists=0 if lists is None else lists.shape[0],
        units=units,
        dtype=_DTYPES[dtype],
        precision=float32_precision() if dtype == torch.float32 else "tf32",
        configs=configs(args.width, units, dtype, arch, lists is not None or args.assignment_down is not None),
    )


def plans_of(args: AdapterArguments, arch: int, lists: Tensor | None) -> list[Plan]:
    """The launches over tokens; the first plan is that of the weights too.

    Merged tokens need all units. Where ids lie in device memory there may be some, which a second launch serves: a
    kernel that held both would have the registers of the wider one for all tokens.
    """
    if lists is None:
        return [plan_of(args, arch)]
    if args.expert is None:
        return [plan_of(args, arch, lists)]
    return [plan_of(args, arch, lists, "experts"), plan_of(args, arch, None, "merged")]


class Parts(NamedTuple):
    """How the weight gradients are split before they are added up."""

    down: bool  # whether any gradient on the side of w_down is wanted
    up: bool
    scale: bool  # whether the gradient of a learnable scale is wanted
    column_blocks: int
    number: int
    tokens: int  # in one part
    layout: tuple[int, ...]  # after w_down: where w_up, gamma, beta, b_up, b_down and the scale begin; the end
    arrivals: int = 0  # counters before the first part: of programs that share columns, and of all that have a scale

    @property
    def buffer_size(self) -> int:
        """Float32 numbers of all parts and counters."""
        return self.arrivals + self.number * self.layout[-1]


def parts_of(args: AdapterArguments, plan: Plan, needs: AdapterNeeds) -> Parts:
    """The parts of the kernel over weights."""
    config = plan.configs.weights
    column_blocks = -(-args.width // config.block_d)
    parts = _parts(args, needs, column_blocks)
    parts = parts._replace(arrivals=-(-(2 * column_blocks + 1) // 4) * 4)  # so that the parts stay aligned
    most = plan.configs.programs // (column_blocks * max(1, int(parts.down) + int(parts.up)))
    return _shared(parts, plan.tokens, config.block_t, most)


def together_parts(args: AdapterArguments, plan: Plan, needs: AdapterNeeds) -> Parts | None:
    """The parts of a backward pass in one launch, or None where it takes a launch for each."""
    if plan.units > table.ONE_LAUNCH or plan.lists or not needs.x:
        return None
    parts = _parts(args, needs, 1)
    if not (parts.down and parts.up):
        return None
    return _shared(parts, plan.tokens, plan.configs.together.block_t, plan.configs.programs // 2)


def _parts(args: AdapterArguments, needs: AdapterNeeds, column_blocks: int) -> Parts:
    down = needs.w_down or needs.b_down or needs.norm_weight or needs.norm_bias
    scale = needs.scale and args.scale_tensor is not None
    up = needs.w_up or needs.b_up or scale
    d = args.width
    size, norm = d * args.bottleneck, d if args.norm_weight is not None else 0
    at_up = size if down else 0
    at_gamma = at_up + (size if up else 0)
    at_bias = at_gamma + 2 * norm
    at_down_bias = at_bias + (0 if args.b_up is None else args.b_up.numel())
    at_scale = at_down_bias + args.bottleneck
    layout = (at_up, at_gamma, at_gamma + norm, at_bias, at_down_bias, at_scale, at_scale + column_blocks)
    return Parts(down, up, scale, column_blocks, 1, 1, layout)


def _shared(parts: Parts, tokens: int, block_t: int, most: int) -> Parts:
    """The tokens shared out, in whole blocks, among so many parts at most."""
    blocks = -(-tokens // block_t)
    share = -(-blocks // max(1, min(blocks, most))) * block_t
    return parts._replace(number=-(-tokens // share), tokens=share)


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


class Rows(NamedTuple):
    """A tensor [..., d] as the kernels address it: neighbouring columns, rows one stride apart."""

    data: Tensor
    stride: int


_WIDEST_ROW = 8
"""In widths of x. The stride is a constant of the kernels: that of a slice of wider rows has few values, while that of
one token of each image, x[:, 0], has one for each token count, and would have the kernels compiled anew for each."""


def rows_of(x: Tensor) -> Rows:
    """The rows of x in place, or of a copy where its strides do not allow that."""
    if x.is_contiguous():
        return Rows(x, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 or rows.stride(0) > _WIDEST_ROW * rows.shape[1]:
        rows = rows.contiguous()
    return Rows(rows, rows.stride(0))
