"""The adapter's kernels of csrc/adapter.h: tensors become addresses, strides and dtype codes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds, expert_activity
from mosa_kernels.backends.cuda.owned import owned_for
from mosa_kernels.backends.element_types import DTYPE_CODES
from mosa_kernels.backends.variables import whole_number

_ACTIVATION_CODES = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3, "identity": 4}
_ID_DTYPES = (torch.int64, torch.int32)
ONE_LAUNCH = whole_number("MOSA_CUDA_ONE_LAUNCH", "1, or 0 for off", most=1) == 1
"""Whether the backward pass over tokens and weights is one launch by clusters of blocks where the shape and the GPU
(compute capability 9.0 and later) allow it. It has not been measured yet; so far it is for trying out."""

_WIDE = 16  # bytes of the widest access
_NO_TABLES = (0, 0, 0, 0)
_said: set[str] = set()


class Launch(NamedTuple):
    """Where a call runs."""

    module: ModuleType
    device: int
    stream: int  # address of a cudaStream_t
    multiprocessors: int
    has_bfloat16: bool = True  # whether the GPU multiplies matrices of bf16

    def product_dtype(self, args: AdapterArguments) -> torch.dtype:
        """What the operands of the products are: as autocast has it, or float32 where the GPU does not know bf16."""
        lacking = args.matmul_dtype == torch.bfloat16 and not self.has_bfloat16
        return torch.float32 if lacking else args.matmul_dtype


class _Call:
    """One call as the launchers take it. Copies that it points to live as long as it does."""

    def __init__(self, args: AdapterArguments, launch: Launch) -> None:
        self.args = args
        self.tokens = args.x.numel() // args.width
        self.kept: list[Tensor] = []
        expert = args.expert if args.has_experts else None
        self.owned = owned = owned_for(args)  # kept: an assignment that changes meanwhile replaces it
        self.tensors = (
            *self.rows("x", args.x),
            *self.rows("residual", args.residual),
            *self.weight("w_down", args.w_down),
            *self.weight("w_down_init", args.w_down_init),
            *self.vector(args.b_down),
            *self.weight("w_up", args.w_up),
            *self.vector(args.b_up),
            *self.vector(args.norm_weight),
            *self.vector(args.norm_bias),
            *self.vector(args.scale_tensor),
            _address(args.assignment),
            _address(args.assignment_down),
            *self.ids(expert, args.expert_id),
            *self.ids(args.seed if args.dropout_p > 0 else None, args.seed_id),
            *(_NO_TABLES if owned is None else owned.described()),
        )
        b_up = args.b_up
        tf32 = args.matmul_dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.sizes = (
            self.tokens,
            args.width,
            args.bottleneck,
            b_up.shape[0] if b_up is not None and b_up.dim() == 2 else 0,
            _ACTIVATION_CODES[args.activation],
            DTYPE_CODES[launch.product_dtype(args)],
            int(args.add_input),
            int(tf32),
        )
        self.factors = (args.scale, args.expert_scale, args.merged_scale, args.norm_eps, args.dropout_p)

    def launches(self, launch: Launch) -> Iterator[tuple[tuple[int, ...], int]]:
        """The call's tensors and its stream; then, where it may warm up for a CUDA graph, those of the captured call.

        A warm-up is on a side stream. The graph would have no tables (`PerAssignment`), so that it would begin with
        kernels that are not loaded yet: they are loaded.
        """
        yield self.tensors, launch.stream
        if self.owned is not None and launch.stream != 0:
            yield (*self.tensors[: -len(_NO_TABLES)], *_NO_TABLES), launch.module.adapter_cuda_load_only

    def rows(self, name: str, tensor: Tensor | None) -> tuple[int, int, int]:
        """A tensor [..., d] as rows one stride apart: in place, or as a copy where its strides do not allow that."""
        if tensor is None:
            return 0, 0, 0
        rows = tensor if tensor.is_contiguous() else tensor.reshape(-1, tensor.shape[-1])
        stride = tensor.shape[-1]
        if rows is not tensor:
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            if rows.data_ptr() != tensor.data_ptr():
                _say_once(f"{name} of shape {list(tensor.shape)}, strides {list(tensor.stride())} is copied first")
            stride = rows.stride(0)
        self.kept.append(rows)
        address = rows.data_ptr()
        if (address | stride * rows.element_size()) % _WIDE:
            _say_once(f"rows of {name} do not begin at multiples of {_WIDE} bytes and are read element by element")
        return address, stride, DTYPE_CODES[rows.dtype]

    def weight(self, name: str, tensor: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.shape[1], DTYPE_CODES[tensor.dtype])

    def vector(self, tensor: Tensor | None) -> tuple[int, int, int]:
        if tensor is None:
            return 0, 0, 0
        width = tensor.shape[-1] if tensor.dim() else 1
        return tensor.data_ptr(), width, DTYPE_CODES[tensor.dtype]

    def ids(self, ids: Tensor | None, value: int) -> tuple[int, int, int, int]:
        """Address, value in its place, number of groups, and whether the ids are int64."""
        if ids is None:
            return 0, value, 1, 0
        if ids.dtype not in _ID_DTYPES:
            ids = ids.to(torch.int64)
        ids = ids.contiguous()
        self.kept.append(ids)
        return ids.data_ptr(), 0, ids.numel(), int(ids.dtype == torch.int64)


def adapter_forward(args: AdapterArguments, launch: Launch) -> tuple[Tensor, Tensor, Tensor]:
    """Output like x, contiguous; LayerNorm's mean and rstd, float32 [T], or [0] without a norm.

    One launch; with lists of units and ids on the device two, of which the second is for merged tokens.
    """
    call = _Call(args, launch)
    device = args.x.device
    out = torch.empty(args.x.shape, dtype=args.x.dtype, device=device)
    statistics = call.tokens if args.norm_weight is not None else 0
    mean = torch.empty(statistics, dtype=torch.float32, device=device)
    rstd = torch.empty(statistics, dtype=torch.float32, device=device)
    outputs = (out.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    for tensors, stream in call.launches(launch):
        launch.module.adapter_cuda_forward(tensors, call.sizes, call.factors, outputs, launch.device, stream)
    return out, mean, rstd


def adapter_backward(
    args: AdapterArguments, grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: AdapterNeeds, launch: Launch
) -> AdapterGradients:
    """The gradients asked for.

    One launch where only x's is, else three, or two with `ONE_LAUNCH`; with lists of units and ids on the device one
    more, for merged tokens. The bits are the same on every run.
    """
    call = _Call(args, launch)
    device = args.x.device
    dx = torch.empty(args.x.shape, dtype=args.x.dtype, device=device) if needs.x else None
    weights = (
        _gradient_of(args.w_down, needs.w_down),
        _gradient_of(args.b_down, needs.b_down),
        _gradient_of(args.w_up, needs.w_up),
        _gradient_of(args.b_up, needs.b_up),
        _gradient_of(args.norm_weight, needs.norm_weight),
        _gradient_of(args.norm_bias, needs.norm_bias),
        _gradient_of(args.scale_tensor, needs.scale),
    )
    any_weight = any(gradient is not None for gradient in weights)
    if dx is None and not any_weight:
        return AdapterGradients(activity=expert_activity(args) if needs.activity else None)
    # The activity is found by the launch that adds up the weights' gradients; with none of those there is no such one.
    counted = args.activity if needs.activity and any_weight and (args.has_experts or args.expert is None) else None
    activity = None if counted is None else torch.empty_like(counted)

    def described(workspace: Tensor | None, workspace_bytes: int) -> tuple[int, ...]:
        gradients = (dx, *weights)
        return (
            *grad_rows,
            mean.data_ptr(),
            rstd.data_ptr(),
            *(value for gradient in gradients for value in (_address(gradient), _dtype_code(gradient))),
            _address(activity),
            0 if activity is None else activity.shape[0],
            launch.multiprocessors,
            _address(workspace),
            workspace_bytes,
            int(ONE_LAUNCH),
        )

    grad_rows = call.rows("grad_out", grad_out)
    for tensors, stream in call.launches(launch):
        size = 0
        workspace = None
        if any_weight:
            size = launch.module.adapter_cuda_workspace(tensors, call.sizes, call.factors, described(None, 0))
            workspace = torch.empty(-(-size // 4), dtype=torch.float32, device=device)
        launch.module.adapter_cuda_backward(
            tensors, call.sizes, call.factors, described(workspace, size), launch.device, stream
        )
    if needs.activity and activity is None:
        activity = expert_activity(args)
    return AdapterGradients(dx, *weights, activity)


def _gradient_of(source: Tensor | None, needed: bool) -> Tensor | None:
    return torch.empty_like(source, requires_grad=False) if needed and source is not None else None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def _say_once(what: str) -> None:
    kind = what.split(" of shape ")[0]
    if kind not in _said:
        _said.add(kind)
        warnings.warn(f"mosa_kernels, CUDA backend: {what} (said once)", stacklevel=2)
