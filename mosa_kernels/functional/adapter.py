"""The adapter operator: its schema, fake kernels, autograd, autocast and the public function.

`AdapterFunction` is the one definition of the gradient. Eager calls go straight to it; under `torch.compile` the
same class sits behind the operator's Autograd key.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mosa_kernels.backends import reference
from mosa_kernels.backends.arguments import MERGED, TENSORS, AdapterArguments, AdapterNeeds, has_gradients
from mosa_kernels.backends.choice import backend_module, choose_adapter_backend
from mosa_kernels.backends.element_types import PLAIN, in_memory
from mosa_kernels.functional.checks import check_adapter
from mosa_kernels.functional.derivatives import definition_gradients

LIBRARY = torch.library.Library("mosa_kernels", "FRAGMENT")

_ARGUMENTS = """Tensor x, Tensor? residual, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up,
    Tensor? assignment, Tensor? assignment_down, Tensor? w_down_init, Tensor? expert, Tensor? norm_weight,
    Tensor? norm_bias, Tensor? scale_tensor, Tensor? seed, Tensor? activity, SymInt expert_id, SymInt seed_id,
    float norm_eps, str activation, float scale, bool add_input, float expert_scale, float merged_scale,
    float dropout_p, ScalarType? compute_dtype, str backend"""
LIBRARY.define(f"adapter_forward({_ARGUMENTS}) -> (Tensor out, Tensor mean, Tensor rstd)")
LIBRARY.define(
    f"adapter_backward(Tensor grad_out, Tensor mean, Tensor rstd, bool[] needs, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_DEVICES = ("CPU", "CUDA")


def _forward_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = arguments
    return backend_module(backend).adapter_forward(AdapterArguments(*fields))


def _backward_kernel(
    grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, backend = arguments
    args = AdapterArguments(*fields)
    grads = backend_module(backend).adapter_backward(args, grad_out, mean, rstd, AdapterNeeds(*needs))
    return tuple(args.x.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = AdapterArguments(*arguments[:-1])
    check_adapter(args)
    tokens = args.x.numel() // args.width if args.norm_weight is not None else 0
    return (
        args.x.new_empty(args.x.shape),
        args.x.new_empty(tokens, dtype=torch.float32),
        args.x.new_empty(tokens, dtype=torch.float32),
    )


def _gradient_sources(args: AdapterArguments) -> tuple[Tensor | None, ...]:
    """The differentiable arguments, in the order of `AdapterNeeds`."""
    return (
        args.x,
        args.w_down,
        args.b_down,
        args.w_up,
        args.b_up,
        args.norm_weight,
        args.norm_bias,
        args.scale_tensor,
        args.activity,
    )


def _backward_fake(
    grad_out: Tensor, mean: Tensor, rstd: Tensor, needs: list[bool], *arguments: Any
) -> tuple[Tensor, ...]:
    args = AdapterArguments(*arguments[:-1])
    return tuple(
        source.new_empty(source.shape) if needed and source is not None else args.x.new_empty(0)
        for needed, source in zip(needs, _gradient_sources(args), strict=True)
    )


for _device in _DEVICES:
    LIBRARY.impl("adapter_forward", _forward_kernel, _device)
    LIBRARY.impl("adapter_backward", _backward_kernel, _device)
torch.library.register_fake("mosa_kernels::adapter_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("mosa_kernels::adapter_backward", _backward_fake, lib=LIBRARY)

_forward_op = torch.ops.mosa_kernels.adapter_forward.default
_backward_op = torch.ops.mosa_kernels.adapter_backward.default
_FIELDS = AdapterArguments._fields
_RESIDUAL = _FIELDS.index("residual")
_NEEDS_POSITIONS = tuple(_FIELDS.index("scale_tensor" if name == "scale" else name) for name in AdapterNeeds._fields)


_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _nobody_watches(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the kernel may be called without the dispatcher.

    Nothing but a dispatch mode (a FLOP counter, fake tensors, tracing) or a tensor subclass can tell the difference.
    Host time of a call, forward / forward and backward, with kernels that do nothing (EPYC 9004, two cores):
    this way 28 / 124 us, `AdapterFunction` over the dispatcher 38 / 160 us, `register_autograd` 168 / 298 us.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:  # noqa: SIM110 (a loop takes 0.6 us, all() over a generator 1.4 us)
        if tensor is not None and type(tensor) not in PLAIN:
            return False
    return True


def _is_transformed(args: AdapterArguments) -> bool:
    """Whether torch.func or forward-mode differentiation follows the call: there are rules for PyTorch's operators, and
    none for a kernel or for the report of the experts."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = (tensor for tensor in args[:TENSORS] if isinstance(tensor, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _definition(args: AdapterArguments) -> Tensor:
    if _is_transformed(args):
        args = args._replace(activity=None)
    if args.x.device.type == "meta":  # PyTorch raises where it is asked about autocast there
        return reference.adapter(args)
    with torch.autocast(args.x.device.type, enabled=False):
        return reference.adapter(args)


def _by_definition(options: Sequence[Any], tensors: Sequence[Any]) -> Tensor:
    *fields, _ = options  # the backend comes last
    return _definition(AdapterArguments(*tensors, *fields))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Below autograd and autocast."""
    if _nobody_watches(arguments[:TENSORS]):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return _forward_kernel(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        found: tuple[Tensor, Tensor, Tensor] = _forward_op(*arguments)
    return found


class AdapterFunction(torch.autograd.Function):
    """Saves its arguments and the LayerNorm statistics (8 bytes a token); the bottleneck is computed again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, mean, rstd = _forward(*arguments)
        residual = arguments[_RESIDUAL]
        ctx.residual_dtype = None if residual is None else residual.dtype
        # The backward pass has no use for the residual, whose memory may thus go.
        ctx.save_for_backward(mean, rstd, *arguments[:_RESIDUAL], None, *arguments[_RESIDUAL + 1 : TENSORS])
        ctx.options = arguments[TENSORS:]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_out = in_memory(grad_out)
        mean, rstd, *tensors = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[_RESIDUAL]:
            found[_RESIDUAL] = grad_out.to(ctx.residual_dtype)
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad_out):
            needed = [need and position != _RESIDUAL for position, need in enumerate(ctx.needs_input_grad[:TENSORS])]
            graph = definition_gradients(partial(_by_definition, ctx.options), tensors, needed, [grad_out])
            for position, gradient in enumerate(graph):
                found[position] = found[position] if gradient is None else gradient
            return tuple(found)
        needs = [ctx.needs_input_grad[position] for position in _NEEDS_POSITIONS]
        if _nobody_watches((grad_out, mean, rstd, *tensors)):
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                grads = _backward_kernel(grad_out, mean, rstd, needs, *tensors, *ctx.options)
        else:
            grads = _backward_op(grad_out, mean, rstd, needs, *tensors, *ctx.options)
        for position, grad, need in zip(_NEEDS_POSITIONS, grads, needs, strict=True):
            if need:
                found[position] = grad
        return tuple(found)


def _autograd_kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return AdapterFunction.apply(*arguments)


LIBRARY.impl("adapter_forward", _autograd_kernel, "Autograd")


def _with_autocast_dtype(device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    compute_dtype = _FIELDS.index("compute_dtype")
    if arguments[compute_dtype] is not None or arguments[_FIELDS.index("x")].dtype == torch.float64:
        return arguments
    return (*arguments[:compute_dtype], torch.get_autocast_dtype(device_type), *arguments[compute_dtype + 1 :])


def _register_autocast(device: str) -> None:
    """Autocast chooses the dtype of the matrix products; no weight is cast, and nothing inside is cast again."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _forward_op(*_with_autocast_dtype(device.lower(), arguments))

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _backward_op(*arguments)

    LIBRARY.impl("adapter_forward", forward, f"Autocast{device}")
    LIBRARY.impl("adapter_backward", backward, f"Autocast{device}")


for _device in _DEVICES:
    _register_autocast(_device)


def _as_int(number: Any) -> Any:
    """What stands for an integer, as NumPy's do, as one; anything else as it is."""
    if isinstance(number, (int, torch.SymInt, Tensor)) or not hasattr(number, "__index__"):
        return number
    try:
        return operator.index(number)
    except TypeError:  # an array of several
        return number


def mosa_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    assignment: Tensor | None = None,
    expert: Tensor | int | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    add_input: bool = True,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    assignment_down: Tensor | None = None,
    w_down_init: Tensor | None = None,
    expert_scale: float = 1.0,
    merged_scale: float = 1.0,
    activity: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A sparse adapter with one active expert (arXiv 2312.02923, Eq. 1, 2 and 5)::

        u   = LayerNorm(x; norm_weight, norm_bias, norm_eps)     with norm_weight, else x
        a   = dropout(activation(u @ w_down.T + b_down))
        y   = a @ where(assignment == e, expert_scale * w_up, 0).T + b_up[e]
        out = [x] + [residual] + scale * y

    The gradient of `w_up` is exactly zero outside the entries of the experts that ran.

    Args:
        x: tokens [..., d], floating point. Autocast chooses the dtype of the matrix products, unless x is float64.
        w_down: down-projection [r, d], of x's dtype or float32, as all parameters.
        b_down: its bias [r], or None.
        w_up: up-projection [d, r], one copy for all experts.
        b_up: its bias, [N, d] one per expert or [d] shared, or None.
        assignment: uint8 [d, r], the owner of each entry of `w_up` (see `split`); None: a dense, plain adapter.
        expert: the active expert e: a number, or an integer tensor [] or [G] with G a divisor of x.shape[0], one for
            each of G equal runs of x's first dimension. -1, or None for all of x, is the *merged* adapter:
            `merged_scale * w_up` and the mean of `b_up` over the experts.
        norm_weight, norm_bias: LayerNorm parameters [d], or None.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "identity".
        scale: a number, or a learnable tensor [].
        residual: a second summand of the output, shaped like x, or None. Of x's dtype; under autocast the output has
            the wider one of both.
        add_input: whether x itself is a summand of the output.
        dropout_p: probability of dropping an entry of the bottleneck.
        seed: of the dropout mask: a number, or int64 [] or [G] like `expert`; None draws one from PyTorch's default
            generator. Masks of seeds that lie close are shifts of each other, so draw them at random, too.
        assignment_down, w_down_init: a sparse down-projection: uint8 [r, d] and the values [r, d] that an expert sees
            outside its own entries.
        expert_scale: factor on the active expert's entries (not on its bias); of a sparse down-projection on what they
            differ from `w_down_init` by.
        merged_scale: the same for the merged projection: 1/N is the mean of the experts, 1 Eq. 7.
        activity: float32 [N] that requires grad: its gradient is 1 for each expert that ran (none within
            transforms of torch.func and in forward-mode differentiation).
        backend: None for the automatic choice, or "reference", "cpu", ... (see `available_backends`). Within transforms
            of torch.func and in forward-mode differentiation that is "reference", and whatever it is torch.jit.trace
            records the definition.

    Returns:
        Tensor with the shape and dtype of x, differentiable any number of times; where a graph of the backward pass is
        built (`create_graph=True`), its gradients are computed by the PyTorch definition.

    Raises:
        TypeError: an argument is no tensor, or one of a dtype that the operator does not take.
        ValueError: a shape, device or option is wrong, or the backend asked for does not take the call.
    """
    expert, seed = _as_int(expert), _as_int(seed)
    if isinstance(w_down_init, Tensor) and w_down_init.requires_grad:
        w_down_init = w_down_init.detach()  # frozen
    compute_dtype = None
    # PyTorch raises where it is asked about other devices; what is no tensor, `check_adapter` names.
    autocasts = isinstance(x, Tensor) and x.device.type != "meta"
    if autocasts and torch.is_autocast_enabled(x.device.type):
        if x.dtype != torch.float64:  # which PyTorch's autocast leaves as it is, too
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        if isinstance(residual, Tensor) and residual.dtype != x.dtype:
            x = x.to(torch.promote_types(x.dtype, residual.dtype))  # a narrower residual is widened as it is added
            residual = residual if compute_dtype is not None else residual.to(x.dtype)
    if dropout_p and seed is None and isinstance(x, Tensor):
        seed = torch.randint(2**63 - 1, (), device=x.device)
    args = AdapterArguments(
        x,
        residual,
        w_down,
        b_down,
        w_up,
        b_up,
        assignment,
        assignment_down,
        w_down_init,
        expert if isinstance(expert, Tensor) else None,
        norm_weight,
        norm_bias,
        scale if isinstance(scale, Tensor) else None,
        seed if isinstance(seed, Tensor) else None,
        activity,
        MERGED if expert is None or isinstance(expert, Tensor) else expert,
        0 if seed is None or isinstance(seed, Tensor) else seed,
        norm_eps,
        activation,
        1.0 if isinstance(scale, Tensor) else scale,
        add_input,
        expert_scale,
        merged_scale,
        dropout_p,
        compute_dtype,
    )
    check_adapter(args)
    if not torch.compiler.is_compiling():
        if x.is_neg() or (residual is not None and residual.is_neg()):
            args = args._replace(x=x.resolve_neg(), residual=None if residual is None else residual.resolve_neg())
        if _is_transformed(args):
            if backend not in (None, "reference"):
                raise ValueError(
                    "backend: expected None or 'reference' within transforms of torch.func and in forward-mode "
                    f"differentiation, got {backend!r}"
                )
            backend = "reference"
        elif torch.jit.is_tracing():
            # It sees PyTorch's operators alone, and takes what a kernel wrote for a constant.
            backend = "reference"
    name = choose_adapter_backend(args, backend)
    if name == "reference":
        return _definition(args)
    if torch.compiler.is_compiling():
        return torch.ops.mosa_kernels.adapter_forward(*args, name)[0]
    if _is_followed(args):
        return AdapterFunction.apply(*args, name)[0]
    return _forward(*args, name)[0]


def _is_followed(args: AdapterArguments) -> bool:
    """Whether anything differentiates the call; without autograd's bookkeeping it takes the host 8 us less."""
    return torch.is_grad_enabled() and has_gradients(args)
