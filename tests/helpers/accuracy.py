"""The rule for the error of a fused kernel: at most twice that of eager PyTorch in the same precision.

Both errors are root mean squares against float64. Where eager PyTorch happens to be exact, a kernel that adds in
another order still has to be allowed the rounding of its own sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from oracle import double, oracle_adapter
from torch import Tensor

from mosa_kernels.backends import reference
from mosa_kernels.backends.arguments import MERGED, AdapterArguments, AdapterGradients, AdapterNeeds

_DIFFERENTIABLE = ("x", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "scale")
_FLOAT32_ROUNDINGS = 8  # of the largest value: what the order of a short sum can change


def argument(args: AdapterArguments, name: str) -> Tensor | None:
    return args.scale_tensor if name == "scale" else getattr(args, name)


def all_needs(args: AdapterArguments) -> AdapterNeeds:
    return AdapterNeeds(
        **{name: argument(args, name) is not None for name in _DIFFERENTIABLE}, activity=args.activity is not None
    )


def on(args: AdapterArguments, device: torch.device | str) -> AdapterArguments:
    """The same call with its tensors, as leaves, on a device."""
    return args._replace(
        **{
            name: value.detach().to(device).requires_grad_(value.requires_grad)
            for name, value in args._asdict().items()
            if isinstance(value, Tensor)
        }
    )


def well_conditioned(args: AdapterArguments) -> AdapterArguments:
    """A LayerNorm over one or two columns divides by almost nothing: no two orders of its sums agree."""
    return args._replace(norm_eps=1.0) if args.norm_weight is not None and args.width < 3 else args


class Expected:
    """Output and gradients of a call, by the oracle in float64 and by eager PyTorch."""

    def __init__(self, args: AdapterArguments, grad_out: Tensor) -> None:
        names = [name for name in _DIFFERENTIABLE if argument(args, name) is not None]
        exact_args = double(on(args, "cpu"))
        exact = oracle_adapter(exact_args)
        eager = reference.adapter(args._replace(activity=None))
        self.args = args
        self.out = (exact.detach(), eager.detach())
        self.gradients = dict(
            zip(
                names,
                zip(
                    _gradients(exact, [argument(exact_args, name) for name in names], grad_out.cpu().double()),
                    _gradients(eager, [argument(args, name) for name in names], grad_out),
                    strict=True,
                ),
                strict=True,
            )
        )
        # The gradient of the scale is one sum over everything, whose rounding follows its terms and not its value.
        y = exact.detach()
        self.terms_of_scale = float((grad_out.cpu().double() * y).abs().mean()) * y.numel() ** 0.5

    def check_out(self, out: Tensor) -> None:
        assert out.shape == self.args.x.shape
        assert out.dtype == self.args.x.dtype
        self._check("out", out, *self.out)

    def check_gradients(self, found: AdapterGradients) -> None:
        for name, (exact, eager) in self.gradients.items():
            gradient, source = getattr(found, name), argument(self.args, name)
            assert gradient is not None, name
            assert gradient.shape == source.shape, name
            assert gradient.dtype == source.dtype, name
            self._check(name, gradient, exact, eager)
            idle = _owned_by_idle_experts(self.args, name)
            if idle is not None:
                assert not gradient[idle].any(), f"{name}: not exactly zero where no active expert owns it"

    def check_long_sums(self, found: AdapterGradients) -> None:
        """Gradients of parameters in float32 over many tokens, without what the order of a short sum may change."""
        for name in self.gradients.keys() - {"x", "scale"}:
            error, eager_error = self._errors(getattr(found, name), *self.gradients[name])
            assert error <= 2 * eager_error, f"{name}: error {error:.3g}, eager PyTorch {eager_error:.3g}"

    @staticmethod
    def _errors(found: Tensor, exact: Tensor, eager: Tensor) -> tuple[float, float]:
        error, eager_error = (_rms(value.detach().cpu().double() - exact) for value in (found, eager))
        return error, eager_error

    def _check(self, name: str, found: Tensor, exact: Tensor, eager: Tensor) -> None:
        error, eager_error = self._errors(found, exact, eager)
        magnitude = max(1.0, float(exact.abs().max()), self.terms_of_scale if name == "scale" else 0.0)
        allowance = _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps * magnitude
        coarsest = max((self.args.matmul_dtype, self.args.x.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        if coarsest != torch.float32:
            allowance += torch.finfo(coarsest).eps / 4 * magnitude
        assert error <= 2 * eager_error + allowance, (
            f"{name}: error {error:.3g}, eager PyTorch {eager_error:.3g}, allowance {allowance:.3g}"
        )


def check_nans(args: AdapterArguments, out: Tensor, grad_x: Tensor | None) -> None:
    """NaN is where the definition has it: a loss that diverges has to be seen. grad_x: by a gradient of ones."""
    expected = reference.adapter(args._replace(activity=None))
    assert expected.isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())
    if args.x.isnan().any():
        assert not expected.isnan().all(), "other tokens have nothing to do with it"
        assert grad_x is not None
        (exact,) = torch.autograd.grad(expected, args.x, torch.ones_like(expected))
        assert torch.equal(grad_x.isnan(), exact.isnan())


def _owned_by_idle_experts(args: AdapterArguments, name: str) -> Tensor | None:
    """Which entries of a parameter belong to experts that did not run; None where experts own nothing of it."""
    ran = {args.expert_id} if args.expert is None else set(args.expert.reshape(-1).tolist())
    owner = {"w_up": args.assignment, "w_down": args.assignment_down}.get(name)
    if name == "b_up" and args.b_up is not None and args.b_up.dim() == 2:
        owner = torch.arange(args.b_up.shape[0], device=args.b_up.device)
    if owner is None:
        return None
    if MERGED in ran:
        return torch.zeros_like(owner, dtype=torch.bool)
    return ~torch.isin(owner, torch.tensor(sorted(ran), device=owner.device))


def _gradients(out: Tensor, leaves: Sequence[Tensor | None], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
