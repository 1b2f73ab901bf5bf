"""The one place that says what an adapter call has to look like. Each error names the argument, expected, got."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import MERGED, TENSORS, AdapterArguments

_REQUIRED = ("x", "w_down", "w_up")
# Unsigned ones of more bits have next to no operators in PyTorch.
_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_adapter(args: AdapterArguments) -> None:
    """Checks shapes, dtypes, devices and options of a call.

    Raises:
        TypeError: an argument is no tensor, or one of a dtype that the operator does not take.
        ValueError: a shape, device or option is wrong.
    """
    for name, value in zip(args._fields[:TENSORS], args[:TENSORS], strict=True):
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    x, w_down = args.x, args.w_down
    check_floating("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected shape [..., d], got a tensor without dimensions")
    d = x.shape[-1]
    if w_down.dim() != 2 or w_down.shape[1] != d or w_down.shape[0] < 1:
        raise ValueError(f"w_down: expected shape [r, {d}] with r >= 1 for x of width {d}, got {list(w_down.shape)}")
    r = w_down.shape[0]
    b_up = args.b_up
    if b_up is not None and (b_up.dim() not in (1, 2) or b_up.shape[-1] != d or b_up.shape[0] < 1):
        raise ValueError(f"b_up: expected shape [{d}] or [N, {d}], got {list(b_up.shape)}")
    _check_parameters(args, d, r)
    if args.norm_bias is not None and args.norm_weight is None:
        raise ValueError("norm_bias: expected None without norm_weight, got a tensor")
    _check_owner("assignment", args.assignment, (d, r), x)
    _check_owner("assignment_down", args.assignment_down, (r, d), x)
    if (args.w_down_init is None) != (args.assignment_down is None):
        raise ValueError("w_down_init: expected together with assignment_down, got one without the other")
    if args.residual is not None:
        _check_residual(args.residual, args)
    if args.activity is not None:
        if args.activity.dtype != torch.float32:
            raise TypeError(f"activity: expected torch.float32, got {args.activity.dtype}")
        if args.activity.dim() != 1:
            raise ValueError(f"activity: expected shape [N], got {list(args.activity.shape)}")
        _check_device("activity", args.activity, x)
    _check_numbers(args)
    _check_groups("expert", args.expert, x)
    _check_groups("seed", args.seed, x)
    _check_experts(args)

    if args.activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {args.activation!r}")
    if not 0 <= args.dropout_p < 1:
        raise ValueError(f"dropout_p: expected 0 <= p < 1, got {args.dropout_p}")
    if not args.norm_eps >= 0:
        raise ValueError(f"norm_eps: expected at least 0, got {args.norm_eps}")


def check_floating(name: str, tensor: object) -> None:
    """
    Raises:
        TypeError: no tensor, or one that is not floating point.
    """
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")


def _check_parameters(args: AdapterArguments, d: int, r: int) -> None:
    """In one pass: this takes most of the host's time in a check, and there is one for each call."""
    x, mixed = args.x, args.compute_dtype is not None
    dtype, device = x.dtype, x.device
    for name, tensor, shape in (
        ("w_down", args.w_down, None),
        ("b_down", args.b_down, (r,)),
        ("w_up", args.w_up, (d, r)),
        ("b_up", args.b_up, None),
        ("w_down_init", args.w_down_init, (r, d)),
        ("norm_weight", args.norm_weight, (d,)),
        ("norm_bias", args.norm_bias, (d,)),
        ("scale", args.scale_tensor, None),
    ):
        if tensor is None:
            continue
        if shape is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != dtype and tensor.dtype != torch.float32 and not mixed:
            raise TypeError(f"{name}: expected {dtype} (as x) or torch.float32, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device} (as x), got {tensor.device}")
    if args.scale_tensor is not None and args.scale_tensor.dim() != 0:
        raise ValueError(f"scale: expected a number or a tensor of shape [], got {list(args.scale_tensor.shape)}")


def _check_residual(residual: Tensor, args: AdapterArguments) -> None:
    x = args.x
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {list(x.shape)}, got {list(residual.shape)}")
    if residual.dtype != x.dtype:
        mixed = args.compute_dtype is not None and torch.promote_types(x.dtype, residual.dtype) == x.dtype
        if not mixed:
            raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
    _check_device("residual", residual, x)


def _check_numbers(args: AdapterArguments) -> None:
    integers: tuple[tuple[str, object], ...] = (("expert", args.expert_id), ("seed", args.seed_id))
    for name, number in integers:
        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected None, an integer or an integer tensor, got {type(number).__name__}")
    if not torch.compiler.is_compiling() and not -(2**63) <= args.seed_id < 2**63:
        raise ValueError(f"seed: expected a signed number of 64 bits, got {args.seed_id}")
    if not isinstance(args.add_input, bool):
        raise TypeError(f"add_input: expected True or False, got {args.add_input!r}")
    factors: tuple[tuple[str, object], ...] = (
        ("scale", args.scale),
        ("expert_scale", args.expert_scale),
        ("merged_scale", args.merged_scale),
        ("dropout_p", args.dropout_p),
        ("norm_eps", args.norm_eps),
    )
    for name, factor in factors:
        if not isinstance(factor, (float, int)) and not hasattr(factor, "__float__"):
            raise TypeError(f"{name}: expected a number, got {type(factor).__name__}")


def _check_owner(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name}: expected torch.uint8, got {tensor.dtype}")
    _check_device(name, tensor, x)


def _check_groups(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype not in _ID_DTYPES:
        raise TypeError(f"{name}: expected an integer tensor, got {tensor.dtype}")
    if tensor.dim() > 1 or (
        tensor.dim() == 1 and (tensor.shape[0] == 0 or x.shape[0] % tensor.shape[0] != 0 or x.dim() == 1)
    ):
        raise ValueError(
            f"{name}: expected shape [] or [G] with G a divisor of x.shape[0], "
            f"got {list(tensor.shape)} for x {list(x.shape)}"
        )
    _check_device(name, tensor, x)


def _check_device(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is not None and tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device} (as x), got {tensor.device}")


def has_no_values() -> bool:
    """Whether tensors stand for others: while a graph is made, and within `torch.func.vmap`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _check_experts(args: AdapterArguments) -> None:
    """Ids are looked at where that costs nothing: numbers and tensors on the CPU that hold any."""
    count = None
    if args.b_up is not None and args.b_up.dim() == 2:
        count = args.b_up.shape[0]
    if args.activity is not None:
        if count is not None and args.activity.shape[0] != count:
            raise ValueError(
                f"activity: expected shape [{count}] as b_up has {count} rows, got {list(args.activity.shape)}"
            )
        count = args.activity.shape[0]
    check_expert_ids(args.expert_id if args.expert is None else args.expert, 255 if count is None else count)


def check_expert_ids(expert: Tensor | int, count: int, name: str = "expert") -> None:
    """
    Args:
        count: how many experts there are.
        name: of the argument, for the message.

    Raises:
        ValueError: one of the ids, as far as they can be looked at for nothing, is of no expert.
    """
    if not isinstance(expert, Tensor):
        ids = [expert]
    elif expert.device.type == "cpu" and type(expert) is Tensor and not has_no_values():
        listed = expert.tolist()
        ids = listed if isinstance(listed, list) else [listed]
    else:
        return
    if ids and (min(ids) < MERGED or max(ids) >= count):
        raise ValueError(f"{name}: expected 0 to {count - 1}, or {MERGED} for the merged adapter, got {ids}")
