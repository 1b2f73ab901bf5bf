"""The adapter's forward pass, tile by tile (arXiv 2312.02923, Eq. 1, 2 and 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.cpu.memory import empty_contiguous
from mosa_kernels.backends.cpu.operands import ExpertTensors, Operands
from mosa_kernels.backends.cpu.plan import make_plan


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    """One adapter call without autograd.

    Returns:
        out: contiguous, shape and dtype of x.
        mean, rstd: LayerNorm statistics, float32 [T]; empty without a norm.
    """
    tokens = args.x.numel() // args.width
    plan = make_plan(args, tokens)
    operands = Operands(args, plan.order)
    residual = None if args.residual is None else operands.rows(args.residual)
    out = empty_contiguous(operands.x)  # [T, d], in the order of the tiles
    statistics = args.x.new_empty((2, tokens if args.norm_weight is not None else 0), dtype=torch.float32)

    expert: int | None = None
    for tile in plan.tiles:
        if tile.expert != expert:
            expert = tile.expert
            tensors = operands.expert(expert)
            bias = None if tensors.bias is None else (tensors.bias * operands.scale).to(args.x.dtype)
        rows = slice(tile.start, tile.stop)
        x = operands.x[rows]
        u, mean, rstd = operands.normalized(x)
        if mean is not None and rstd is not None:
            statistics[0, rows] = mean.view(-1)
            statistics[1, rows] = rstd.view(-1)
        a = operands.bottleneck(u, tensors.w_down, tile.start, tile.stop).a
        summands = [x] if args.add_input else []
        if residual is not None:
            summands.append(residual[rows])
        _add_product(out[rows], summands, bias, a, tensors, operands.alpha)

    if plan.order is not None:
        out = empty_contiguous(out).index_copy_(0, plan.order, out)
        statistics = (
            torch.empty_like(statistics).index_copy_(1, plan.order, statistics) if statistics.numel() else statistics
        )
    # An operator's outputs may not share memory.
    return out.view(args.x.shape), statistics[0].clone(), statistics[1].clone()


def _add_product(
    out: Tensor, summands: list[Tensor], bias: Tensor | None, a: Tensor, tensors: ExpertTensors, alpha: float
) -> None:
    """``out = sum(summands) + bias + alpha * a @ w_up.T``; each summand is [n, d], the bias [d]."""
    w_up = tensors.w_up.mT
    carried = summands if bias is None else [*summands, bias]
    if a.dtype != out.dtype:
        product = torch.mm(a, w_up)
        _sum(carried, out)
        out.add_(product, alpha=alpha)
    elif len(carried) == 1:
        torch.addmm(carried[0], a, w_up, alpha=alpha, out=out)
    elif out.dtype == torch.float32:
        _sum(carried, out)
        out.addmm_(a, w_up, beta=1 if carried else 0, alpha=alpha)
    else:  # what is small first: the large sums are rounded to 16 bits as often as in eager PyTorch
        if bias is None:
            out.addmm_(a, w_up, beta=0, alpha=alpha)
        else:
            torch.addmm(bias, a, w_up, alpha=alpha, out=out)
        for summand in summands:
            out.add_(summand)


def _sum(summands: list[Tensor], out: Tensor) -> None:
    if len(summands) >= 2:
        torch.add(summands[0], summands[1], out=out)
        for summand in summands[2:]:
            out.add_(summand)
    elif summands:
        out.copy_(summands[0])
    else:
        out.zero_()
