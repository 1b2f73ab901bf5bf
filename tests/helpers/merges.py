"""Random adapters to merge, the definition in float64, and how far a merge may be from it."""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_kernels.backends.merge import MergedWeights, MergeInput

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest subnormal


def owners(rows: int, columns: int, experts: int, generator: torch.Generator) -> Tensor:
    return torch.randint(experts, (rows, columns), generator=generator)


def oracle(a: MergeInput, fold_norm: bool) -> MergedWeights:
    """The folded weights, straight from the definition, in float64."""

    def wide(tensor: Tensor | None, default: float, size: int) -> Tensor:
        return torch.full((size,), default, dtype=torch.float64) if tensor is None else tensor.detach().double()

    r, d = a.w_down.shape
    w_down, scale = a.w_down.detach().double(), float(a.scale)
    if a.w_down_init is not None:
        initial = a.w_down_init.double()
        w_down = initial + a.down_factor * (w_down - initial)
    gamma = wide(a.norm_weight if fold_norm else None, 1.0, d)
    beta = wide(a.norm_bias if fold_norm else None, 0.0, d)
    has_b_down = a.b_down is not None or (fold_norm and a.norm_bias is not None)
    return MergedWeights(
        w_down * gamma,
        wide(a.b_down, 0.0, r) + w_down @ beta if has_b_down else None,
        scale * a.up_factor * a.w_up.detach().double(),
        None if a.b_up is None else scale * a.b_up.detach().double().reshape(-1, d).mean(0),
    )


def assert_close(got: MergedWeights, want: MergedWeights, a: MergeInput, dtype: torch.dtype) -> None:
    """Within the rounding of the result, plus that of an fp32 sum relative to its largest summand."""
    d = a.w_down.shape[1]
    beta = 0.0 if a.norm_bias is None else a.norm_bias.abs().max().item()
    initial = a.w_down if a.w_down_init is None else a.w_down_init
    largest = 3 * max(a.w_down.abs().max().item(), initial.abs().max().item())
    for name, one, other in zip(MergedWeights._fields, got, want, strict=True):
        assert (one is None) == (other is None), name
        if one is None or other is None:
            continue
        assert one.dtype == dtype
        assert not one.requires_grad
        assert one.shape == other.shape
        summands = d * largest * max(beta, 1.0) if "down" in name else 10.0
        sum_error = 2.0**-23 * (summands if name == "b_down" else max(summands / d, 10.0))
        bound = other.abs() * (HALF_ULP[dtype] * 1.001 + 2.0**-21) + SMALLEST[dtype] + sum_error
        excess = ((one.double() - other).abs() - bound).max().item()
        assert excess <= 0, f"{name}: off by {excess} more than allowed"


def random_adapter(
    d: int,
    r: int,
    experts: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    shared_bias: bool = False,
    sparse_down: bool = False,
    without: tuple[str, ...] = (),
) -> MergeInput:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    adapter = MergeInput(
        w_down=draw(r, d),
        b_down=draw(r),
        w_up=draw(d, r),
        b_up=draw(d) if shared_bias else draw(experts, d),
        norm_weight=draw(d) + 1,
        norm_bias=draw(d),
        scale=0.1,
        up_factor=1 / experts,
        w_down_init=draw(r, d) if sparse_down else None,
        down_factor=1 / experts if sparse_down else 1.0,
    )
    return adapter._replace(**dict.fromkeys(without))
