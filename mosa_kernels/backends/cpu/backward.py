"""The adapter's backward pass, tile by tile. The bottleneck is computed again from x.

Weight gradients are summed in float32, expert by expert, and spread over the entries that the expert owns at the end
(masks are disjoint, so one dense gradient holds them all).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import (
    MERGED,
    AdapterArguments,
    AdapterGradients,
    AdapterNeeds,
    expert_activity,
)
from mosa_kernels.backends.cpu.memory import empty_contiguous
from mosa_kernels.backends.cpu.operands import Bottleneck, ExpertTensors, Operands
from mosa_kernels.backends.cpu.plan import Tile, make_plan


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    """The gradients asked for in `needs`.

    Args:
        grad_out: gradient of the output, shaped like x.
        mean, rstd: LayerNorm statistics from `adapter_forward`, float32 [T] or empty.
    """
    return _Backward(args, grad_out, mean, rstd, needs).run()


class _Backward:
    def __init__(self, args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds):
        self.args, self.needs = args, needs
        self.plan = make_plan(args, args.x.numel() // args.width)
        order = self.plan.order
        self.operands = Operands(args, order)
        self.grad_out = self.operands.rows(grad_out)
        self.statistics = (mean, rstd) if order is None or not mean.numel() else (mean[order], rstd[order])
        self.grad_x = empty_contiguous(self.operands.x) if needs.x else None
        self.norm_mask = [
            needs.x,
            needs.norm_weight and args.norm_weight is not None,
            needs.norm_bias and args.norm_bias is not None,
        ]
        self.below = needs.w_down or needs.b_down or any(self.norm_mask)
        # sums over the tokens of one expert, float32
        self.up: Tensor | None = None  # [d, r] grad_out.T @ a
        self.columns: Tensor | None = None  # [d] column sums of grad_out
        self.down: Tensor | None = None  # [r, d]
        # sums over all tokens, float32
        self.w_down: Tensor | None = None
        self.w_up: Tensor | None = None
        self.b_up: Tensor | None = None
        self.b_down: Tensor | None = None
        self.norm_weight: Tensor | None = None
        self.norm_bias: Tensor | None = None
        self.scale: Tensor | None = None

    def run(self) -> AdapterGradients:
        tensors: ExpertTensors | None = None
        expert = MERGED
        for tile in self.plan.tiles:
            if tensors is None or tile.expert != expert:
                if tensors is not None:
                    self._finish_expert(expert, tensors)
                expert = tile.expert
                tensors = self.operands.expert(expert)
            self._tile(tile, tensors)
        if tensors is not None:
            self._finish_expert(expert, tensors)
        return self._gradients()

    def _tile(self, tile: Tile, tensors: ExpertTensors) -> None:
        needs, operands = self.needs, self.operands
        rows = slice(tile.start, tile.stop)
        x, grad_out = operands.x[rows], self.grad_out[rows]
        grad_y = grad_out.to(operands.dtype)
        if self.columns_needed:
            self.columns = _plus(self.columns, grad_out.sum(0, dtype=torch.float32))
        if not (self.below or needs.w_up or needs.scale):
            return
        u = operands.normalized(x).u
        bottleneck = operands.bottleneck(u, tensors.w_down, tile.start, tile.stop)
        if needs.w_up or needs.scale:
            self.up = _plus_product(self.up, grad_y.mT, bottleneck.a)
        if not self.below:
            return
        grad_z = self._grad_z(grad_y, bottleneck, tensors)
        if needs.w_down:
            self.down = _plus_product(self.down, grad_z.mT, u)
        if needs.b_down:
            self.b_down = _plus(self.b_down, grad_z.sum(0, dtype=torch.float32))
        if any(self.norm_mask):
            self._through_norm(rows, x, grad_out, grad_z, tensors)

    @property
    def columns_needed(self) -> bool:
        return self.args.b_up is not None and (self.needs.b_up or self.needs.scale)

    def _grad_z(self, grad_y: Tensor, bottleneck: Bottleneck, tensors: ExpertTensors) -> Tensor:
        grad_a = torch.empty_like(bottleneck.a).addmm_(grad_y, tensors.w_up, beta=0, alpha=self.operands.alpha)
        if bottleneck.keep is not None:
            grad_a = torch.where(bottleneck.keep, grad_a, 0)
        return self.operands.activation.backward(grad_a, bottleneck.z)

    def _through_norm(self, rows: slice, x: Tensor, grad_out: Tensor, grad_z: Tensor, tensors: ExpertTensors) -> None:
        operands = self.operands
        grad_x = None if self.grad_x is None else self.grad_x[rows]
        if operands.norm_weight is None:
            if self.args.add_input and grad_x is not None and operands.dtype == x.dtype:
                torch.addmm(grad_out, grad_z, tensors.w_down, out=grad_x)
                return
            through: Tensor | None = torch.mm(grad_z, tensors.w_down)
        else:
            mean, rstd = (part[rows].unsqueeze(1) for part in self.statistics)
            through, weight, bias = torch.ops.aten.native_layer_norm_backward(
                torch.mm(grad_z, tensors.w_down).to(x.dtype),
                x,
                (self.args.width,),
                mean,
                rstd,
                operands.norm_weight,
                operands.norm_bias,
                self.norm_mask,
            )
            if self.norm_mask[1]:
                self.norm_weight = _plus(self.norm_weight, weight)
            if self.norm_mask[2]:
                self.norm_bias = _plus(self.norm_bias, bias)
        if grad_x is not None and through is not None:
            if self.args.add_input:
                torch.add(grad_out, through, out=grad_x)
            else:
                grad_x.copy_(through)

    def _finish_expert(self, expert: int, tensors: ExpertTensors) -> None:
        """Moves the sums of one expert into the gradients of all."""
        args, needs, operands = self.args, self.needs, self.operands
        if needs.scale:
            assert self.up is not None
            # the sum of grad_out * y, with both sums over the tokens done already; in double, as much of it cancels
            scale = (self.up.double() * tensors.w_up).sum() * operands.kept_scale
            if self.columns is not None and tensors.bias is not None:
                scale = scale + self.columns.double().dot(tensors.bias.double())
            self.scale = _plus(self.scale, scale)
        if needs.w_up and self.up is not None:
            self.w_up = _plus(self.w_up, self._owned(self.up.mul_(operands.alpha), args.assignment, expert))
        if needs.w_down and self.down is not None:
            self.w_down = _plus(self.w_down, self._owned(self.down, args.assignment_down, expert))
        if needs.b_up and self.columns is not None and args.b_up is not None:
            columns = self.columns.mul_(operands.scale)
            if args.b_up.dim() == 1:
                self.b_up = _plus(self.b_up, columns)
            else:
                if self.b_up is None:
                    self.b_up = torch.zeros(args.b_up.shape, dtype=torch.float32, device=args.b_up.device)
                if expert == MERGED:
                    self.b_up += columns / args.b_up.shape[0]
                else:
                    self.b_up[expert] += columns
        self.up = self.columns = self.down = None

    def _owned(self, total: Tensor, assignment: Tensor | None, expert: int) -> Tensor:
        """An expert's part of a weight gradient: exactly zero outside its own entries. Overwrites `total`."""
        if assignment is None:
            return total
        if expert == MERGED:
            return total.mul_(self.args.merged_scale)
        return total.mul_(self.args.expert_scale).masked_fill_(assignment != expert, 0)

    def _gradients(self) -> AdapterGradients:
        args, needs = self.args, self.needs
        grad_x = self.grad_x
        if grad_x is not None:
            if self.plan.order is not None:
                grad_x = empty_contiguous(grad_x).index_copy_(0, self.plan.order, grad_x)
            grad_x = grad_x.view(args.x.shape)

        def finished(needed: bool, total: Tensor | None, argument: Tensor | None) -> Tensor | None:
            if not needed or argument is None:
                return None
            return torch.zeros_like(argument) if total is None else total.to(argument.dtype)

        return AdapterGradients(
            grad_x,
            finished(needs.w_down, self.w_down, args.w_down),
            finished(needs.b_down, self.b_down, args.b_down),
            finished(needs.w_up, self.w_up, args.w_up),
            finished(needs.b_up, self.b_up, args.b_up),
            finished(needs.norm_weight, self.norm_weight, args.norm_weight),
            finished(needs.norm_bias, self.norm_bias, args.norm_bias),
            finished(needs.scale, self.scale, args.scale_tensor),
            expert_activity(args) if needs.activity and args.activity is not None else None,
        )


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total + left @ right`` in float32."""
    if total is None:
        return torch.mm(left, right).float()
    if left.dtype == torch.float32:
        return total.addmm_(left, right)
    return total.add_(torch.mm(left, right))
