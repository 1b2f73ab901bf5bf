"""The adapter through the compiled kernels of csrc/adapter_cpu.h: one call each way, no copy of any weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.arguments import MERGED, AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.cpu.memory import empty_contiguous
from mosa_kernels.backends.element_types import DTYPE_CODES, PLAIN, dtype_names

_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "identity": 4}
_DESCRIBED = ("x", "residual", "w_down", "w_down_init", "b_down", "w_up", "b_up", "norm_weight", "norm_bias")
_WHOLE_NUMBERS = ("assignment", "assignment_down", "expert", "seed")
_HIGHEST_INSTRUCTION_SET = 255
"""The kernels use the highest that the CPU has, up to this one; 255 stands for the fastest."""


def available() -> tuple[bool, str]:
    reason = extension().reason
    return reason is None, reason or ""


def supports_adapter(args: AdapterArguments) -> tuple[bool, str]:
    """Whether the compiled kernels are there and take the call, and if not, why."""
    if reason := extension().reason:
        return False, reason
    for name in _DESCRIBED:
        tensor = getattr(args, name)
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            return False, f"{name}: expected {dtype_names()}, got {tensor.dtype}"
    for name in (*_DESCRIBED, *_WHOLE_NUMBERS):
        tensor = getattr(args, name)
        if tensor is not None and type(tensor) not in PLAIN:
            return False, f"{name}: expected a plain tensor, got {type(tensor).__name__}"
    return True, ""


def adapter_forward(args: AdapterArguments) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(args)
    out = empty_contiguous(args.x)
    statistics = call.tokens if args.norm_weight is not None else 0
    mean, rstd = (
        torch.empty(statistics, dtype=torch.float32, device=args.x.device) for _ in range(2)
    )  # an operator's outputs may not share memory
    if call.tokens:
        call.run("adapter_cpu_forward", (out, mean, rstd))
    return out, mean, rstd


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds
) -> AdapterGradients:
    call = _Call(args)
    wanted = {
        name: argument
        for name, argument in (
            ("w_down", args.w_down),
            ("b_down", args.b_down),
            ("w_up", args.w_up),
            ("b_up", args.b_up),
            ("norm_weight", args.norm_weight),
            ("norm_bias", args.norm_bias),
            ("scale", args.scale_tensor),
        )
        if argument is not None and getattr(needs, name)
    }
    make = torch.empty if call.tokens else torch.zeros
    grads = {name: make(argument.shape, dtype=torch.float32, device=args.x.device) for name, argument in wanted.items()}
    grad_x = empty_contiguous(args.x) if needs.x else None
    if call.tokens:
        call.run(
            "adapter_cpu_backward",
            (grad_out.contiguous(), mean, rstd, grad_x, *(grads.get(name) for name in AdapterNeeds._fields[1:-1])),
        )
    return AdapterGradients(
        x=grad_x,
        activity=expert_activity(args) if needs.activity and args.activity is not None else None,
        **{name: grad.to(wanted[name].dtype) for name, grad in grads.items()},
    )


class _Call:
    """The arguments of one call as the compiled kernels take them. Keeps alive what they point to."""

    def __init__(self, args: AdapterArguments) -> None:
        self.tokens = args.x.numel() // args.width
        expert = args.expert.to(torch.int64).contiguous() if args.expert is not None and args.has_experts else None
        seed = args.seed.to(torch.int64).contiguous() if args.seed is not None and args.dropout_p > 0 else None
        described = [_contiguous(getattr(args, name)) for name in _DESCRIBED]
        others = [_contiguous(args.assignment), _contiguous(args.assignment_down), expert, seed]
        self._alive = (described, others)
        addresses: list[int] = []
        for tensor in described:
            addresses += (0, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODES[tensor.dtype])
        addresses += [_address(tensor) for tensor in others]
        sizes = (
            self.tokens,
            args.width,
            args.bottleneck,
            args.b_up.shape[0] if args.b_up is not None and args.b_up.dim() == 2 else 0,
            1 if expert is None else expert.numel(),
            1 if seed is None else seed.numel(),
            _ACTIVATIONS[args.activation],
            args.add_input,
            args.matmul_dtype == torch.bfloat16,
            torch.get_num_threads(),
            args.expert_id if args.has_experts else MERGED,
            args.seed_id,
            _HIGHEST_INSTRUCTION_SET,
        )
        self._arguments: tuple[Any, ...] = (
            tuple(addresses),
            sizes,
            args.scale if args.scale_tensor is None else float(args.scale_tensor),
            args.expert_scale,
            args.merged_scale,
            args.norm_eps,
            args.dropout_p,
        )

    def run(self, name: str, results: tuple[Tensor | None, ...]) -> None:
        getattr(extension().module, name)(*self._arguments, tuple(_address(tensor) for tensor in results))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
