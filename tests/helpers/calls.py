"""One full-featured adapter call, of which tests change what they are about."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments


def full_call(
    batch: int = 2,
    length: int = 37,
    d: int = 48,
    r: int = 8,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    n: int = 4,
    expert: Tensor | None = None,
    values: int = 0,
    **options: object,
) -> AdapterArguments:
    """A call on the CPU with a norm, all biases, a residual and n experts; `options` replace its fields."""
    generator = torch.Generator().manual_seed(values)

    def normal(*shape: int, of: torch.dtype = parameter_dtype or dtype, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(shape, generator=generator)).to(of).requires_grad_()

    defaults: dict[str, object] = {
        "x": normal(batch, length, d, of=dtype),
        "residual": normal(batch, length, d, of=dtype),
        "w_down": normal(r, d, gain=d**-0.5),
        "b_down": normal(r),
        "w_up": normal(d, r, gain=r**-0.5),
        "b_up": normal(n, d),
        "assignment": torch.randint(n, (d, r), generator=generator, dtype=torch.uint8),
        "assignment_down": None,
        "w_down_init": None,
        "expert": expert,
        "norm_weight": normal(d),
        "norm_bias": normal(d),
        "scale_tensor": None,
        "seed": None,
        "activity": torch.zeros(n, requires_grad=True),
        "scale": 0.5,
    }
    return AdapterArguments(**{**defaults, **options})  # type: ignore[arg-type]


def sparse_down(d: int, r: int, n: int = 4) -> dict[str, Tensor]:
    """The options that make the down-projection of `full_call` sparse too."""
    generator = torch.Generator().manual_seed(5)
    return {
        "assignment_down": torch.randint(n, (r, d), generator=generator, dtype=torch.uint8),
        "w_down_init": torch.randn(r, d, generator=generator) * d**-0.5,
    }


def call_of_no_expert(dtype: torch.dtype, r: int, n: int = 4) -> tuple[AdapterArguments, AdapterArguments]:
    """A call with ids behind the rows of b_up, where there is NaN; and the same call with rows of zeros there."""
    ids = torch.tensor([n, n + 1, n - 1])
    args = full_call(3, 5, 24, r, dtype, n=n, expert=ids, activity=None)
    assert args.b_up is not None
    rows = torch.full((n + 2, 24), float("nan"), dtype=args.b_up.dtype)
    rows[:n] = args.b_up.detach()
    padded = rows.nan_to_num(0.0)
    return args._replace(b_up=rows[:n].requires_grad_()), args._replace(b_up=padded.requires_grad_())


def relu_call(d: int, dtype: torch.dtype) -> AdapterArguments:
    """A call whose units lie far from zero, on either side, so that no rounding decides a slope of relu."""
    args = full_call(2, 20, d, 12, dtype, activation="relu", expert=torch.tensor(1))
    with torch.no_grad():
        args.w_down.mul_(0.1)
        assert args.b_down is not None
        args.b_down.copy_(torch.arange(12) % 2 * 6.0 - 3)
    return args


def call_with_nan(where: str, activation: str) -> AdapterArguments:
    """A call with one NaN, in a token ("x") or in the bias of a unit ("b_down")."""
    args = full_call(activation=activation, expert=torch.tensor(1))
    with torch.no_grad():
        if where == "x":
            args.x[1, 3, 5] = float("nan")
        else:
            assert args.b_down is not None
            args.b_down[1] = float("nan")
    return args


def far_apart(args: AdapterArguments, device: torch.device | str) -> tuple[AdapterArguments, AdapterArguments, Tensor]:
    """A call of float16, the same with 2^30 elements and more between tokens, and a gradient of its output like it.

    Of the memory in between nothing is touched, so that little of it is real on a CPU.
    """
    tokens, d = args.x.shape[1:]
    step = 2**30 + 16
    try:
        memory = torch.empty((tokens - 1) * step + 3 * d, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"no room for rows so far apart: {error}")
    rows = [memory.as_strided((1, tokens, d), (tokens * step, step, 1), part * d) for part in range(3)]
    assert args.residual is not None
    generator = torch.Generator().manual_seed(9)
    values = (args.x, args.residual, torch.randn(1, tokens, d, generator=generator))
    for row, value in zip(rows, values, strict=True):
        row.copy_(value.detach())
    near = args._replace(
        **{name: value.detach().to(device) for name, value in args._asdict().items() if isinstance(value, Tensor)}
    )
    return near, near._replace(x=rows[0], residual=rows[1]), rows[2]


def hard_tokens(d: int, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens [2, 20, d] with outliers in some columns, and others whose mean is far from zero."""
    outliers = torch.randn(2, 20, d, generator=torch.Generator().manual_seed(3))
    outliers[..., columns] *= 100
    return outliers, torch.randn(2, 20, d, generator=torch.Generator().manual_seed(4)) + 30
