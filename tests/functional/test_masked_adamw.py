"""The operator against `torch.optim.AdamW` in float64 on one masked copy per expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masked_copies import MaskedCopies, masks_of, parameters

from mosa_kernels import FusedMoSAAdapter, MoSAAdamW
from mosa_kernels.functional.masked_adamw import masked_adamw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@settings(max_examples=60)
@given(
    kinds=parameters(),
    backend=st.sampled_from(("cpu", "reference")),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    betas=st.sampled_from(((0.9, 0.999), (0.0, 0.5), (0.8, 0.0))),
    weight_decay=st.sampled_from((0.0, 0.3)),
    tensor_lr=st.booleans(),
    rate=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_equals_adamw_on_masked_copies(kinds, backend, dtype, betas, weight_decay, tensor_lr, rate, seed) -> None:
    assume(backend == "reference" or dtype is torch.float32)
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator, dtype=dtype) for shape, _, _ in kinds]
    owners = [
        torch.randint(n, shape, generator=generator, dtype=torch.uint8) if entries and n is not None else None
        for shape, n, entries in kinds
    ]
    steps = [torch.zeros(() if n is None else (n,)) for _, n, _ in kinds]
    averages, squares = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    copies = [
        MaskedCopies(p, masks_of(p, n, owner), betas=betas, eps=1e-6, weight_decay=weight_decay)
        for p, (_, n, _), owner in zip(params, kinds, owners, strict=True)
    ]
    for step in range(8):
        lr = 0.1 / (1 + step)
        grads = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in params]
        active = [None if n is None else (torch.rand(n, generator=generator) < rate).float() * 3 for _, n, _ in kinds]
        before = [[t.clone() for t in column] for column in (params, averages, squares)]
        masked_adamw(
            params,
            grads,
            averages,
            squares,
            steps,
            owners,
            active,
            lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr,
            betas=betas,
            eps=1e-6,
            weight_decay=weight_decay,
            backend=backend,
        )
        for i, (copy, flags) in enumerate(zip(copies, active, strict=True)):
            moves = [True] if flags is None else [flag > 0 for flag in flags.tolist()]
            copy.step(grads[i], moves, lr)
            for mask, moved in zip(copy.masks, moves, strict=True):
                if not moved:
                    assert all(
                        torch.equal(old[i][mask], new[i][mask])
                        for old, new in zip(before, (params, averages, squares), strict=True)
                    )
    tolerance = TOLERANCE[dtype]
    for i, copy in enumerate(copies):
        torch.testing.assert_close(params[i].double(), copy.together(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(averages[i].double(), copy.together("exp_avg"), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(squares[i].double(), copy.together("exp_avg_sq"), rtol=tolerance, atol=tolerance)
        counts = [float(o.state[c].get("step", 0)) for c, o in zip(copy.copies, copy.optimizers, strict=True)]
        assert steps[i].reshape(-1).tolist() == counts


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pattern", ["all", "some"])
def test_sixteen_bits_round_once(backend: str, pattern: str) -> None:
    """The arithmetic is in float32: stored values are those of a float32 step, rounded."""
    for dtype in (torch.bfloat16, torch.float16):
        p, grad = torch.randn(40, 30).to(dtype), torch.randn(40, 30).to(dtype)
        state = [torch.zeros_like(p), torch.zeros_like(p), torch.zeros(3)]
        wide = [t.clone().float() for t in (p, grad, *state)]
        owner = torch.randint(3, p.shape, dtype=torch.uint8)
        active = torch.ones(3) if pattern == "all" else torch.tensor([1.0, 0.0, 1.0])
        for tensors in ((p, grad, *state), wide):
            columns = [[tensor] for tensor in tensors]
            masked_adamw(*columns, [owner], [active], lr=1e-2, backend=backend)
        assert torch.equal(p, wide[0].to(dtype))
        assert torch.equal(state[0], wide[2].to(dtype))
        assert torch.equal(state[1], wide[3].to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_stands_still_is_not_touched_by_its_gradient(backend: str) -> None:
    p, owner = torch.randn(6, 5), torch.randint(2, (6, 5), dtype=torch.uint8)
    grad = torch.where(owner == 1, torch.nan, 1.0)
    before = p.clone()
    moments = torch.zeros_like(p), torch.zeros_like(p)
    active = torch.tensor([1.0, 0.0])
    masked_adamw(
        [p], [grad], [moments[0]], [moments[1]], [torch.zeros(2)], [owner], [active], lr=0.1, eps=0.0, backend=backend
    )
    assert torch.equal(p[owner == 1], before[owner == 1])
    assert not (p[owner == 0] == before[owner == 0]).any()
    assert p.isfinite().all()
    assert moments[0].isfinite().all()


def test_no_parameters_is_no_work() -> None:
    masked_adamw([], [], [], [], [], [], [], lr=0.1)


def call(**changes: object) -> None:
    p = torch.zeros(4, 3)
    arguments: dict[str, object] = {
        "params": [p],
        "grads": [p.clone()],
        "exp_avgs": [p.clone()],
        "exp_avg_sqs": [p.clone()],
        "steps": [torch.zeros(2)],
        "owners": [torch.zeros(4, 3, dtype=torch.uint8)],
        "active": [torch.ones(2)],
        "lr": 0.1,
    }
    masked_adamw(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads: expected 1 items, as params, got 0"),
        ({"grads": [torch.zeros(3, 4)]}, ValueError, r"grads.*expected the parameter's shape \[4, 3\], got \[3, 4\]"),
        ({"exp_avg_sqs": [torch.zeros(4)]}, ValueError, r"exp_avg_sqs.*expected.*\[4, 3\].*got.*\[4\]"),
        ({"grads": [torch.zeros(4, 3).to_sparse()]}, TypeError, r"grads\[0\]: expected a dense gradient, got.*sparse"),
        ({"owners": [torch.zeros(4, 3)]}, TypeError, r"owners\[0\]: expected torch.uint8, got torch.float32"),
        (
            {"owners": [torch.zeros(4, dtype=torch.uint8)]},
            ValueError,
            r"owners\[0\]: expected shape \[4, 3\].*got \[4\]",
        ),
        (
            {"steps": [torch.zeros(())], "active": [None]},
            ValueError,
            r"owners\[0\]: expected.*with steps \[N\], got.*\[\]",
        ),
        (
            {"owners": [None]},
            ValueError,
            r"steps\[0\]: expected shape \[\] or one count per row of \[4, 3\], got \[2\]",
        ),
        ({"active": [torch.ones(3)]}, ValueError, r"active\[0\]: expected the shape of steps, \[2\], got \[3\]"),
        ({"params": [[0.0]]}, TypeError, r"params\[0\]: expected a floating-point tensor, got list"),
        ({"params": [torch.zeros(4, 3).int()]}, TypeError, r"params\[0\]: .*floating-point tensor, got torch.int32"),
        ({"grads": [None]}, TypeError, r"grads\[0\]: expected a floating-point tensor, got NoneType"),
        ({"exp_avgs": [torch.zeros(4, 3).long()]}, TypeError, r"exp_avgs\[0\]: .* got torch.int64"),
        ({"steps": [torch.zeros(2).half()]}, TypeError, r"steps\[0\]: expected torch.float32, got torch.float16"),
        ({"steps": [0]}, TypeError, r"steps\[0\]: expected a tensor, got int"),
        ({"owners": [3]}, TypeError, r"owners\[0\]: expected a tensor, got int"),
        ({"active": [True]}, TypeError, r"active\[0\]: expected a tensor, got bool"),
        (
            {"exp_avgs": [torch.zeros(4, 3, device="meta")]},
            ValueError,
            r"exp_avgs\[0\]: expected on cpu \(as params\[0\]\), got meta",
        ),
        ({"lr": -0.1}, ValueError, "lr: expected a number of at least 0 and below inf, got -0.1"),
        ({"lr": torch.zeros(3)}, ValueError, r"lr: expected a number or a tensor of shape \[\], got \[3\]"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number of at least 0 and below 1, got 1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number of at least 0 and below inf, got nan"),
        ({"weight_decay": "no"}, ValueError, "weight_decay: expected a number of at least 0 and below inf, got .no."),
        ({"backend": "fast"}, ValueError, "backend: expected one of reference, cpu, triton, cuda or None, got 'fast'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_call_of_the_error_tests_is_right_without_changes() -> None:
    call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("flags", [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("owned", [True, False])
def test_any_strides(backend: str, flags: list[float], owned: bool) -> None:
    owner = torch.randint(3, (3, 4), dtype=torch.uint8) if owned else None
    start, gradient = torch.randn(3, 4), torch.randn(3, 4)
    results = []
    for layout in (torch.clone, lambda t: t.t().contiguous().t()):
        p, grad, average = layout(start), layout(gradient), torch.zeros(3, 4)
        square = torch.zeros_like(p)
        steps = torch.tensor([0.0, 2.0, 5.0])
        masked_adamw([p], [grad], [average], [square], [steps], [owner], [torch.tensor(flags)], lr=0.1, backend=backend)
        results.append((p, average, square))
    for plain, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, plain)
    assert not torch.equal(results[0][0], start)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autograd_is_told_of_the_move(backend: str) -> None:
    """A graph made before a step is differentiated after it: with other weights than it was made with."""
    layer = FusedMoSAAdapter(16, 4)
    optimizer = MoSAAdamW(layer, lr=0.1, backend=backend)
    out = layer(torch.randn(2, 3, 16))
    out.sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=str)
def test_a_rate_of_shape_1_is_a_number(shape: tuple[int, ...]) -> None:
    """It has no say in the dtype of what it is multiplied with, nor in its shape."""
    moved = []
    for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5)):
        p, grad = (torch.full(shape, value, dtype=torch.float64) for value in (1.0, 0.3))
        moments = [[torch.zeros_like(p)], [torch.zeros_like(p)]]
        masked_adamw([p], [grad], *moments, [torch.zeros(())], [None], [None], lr=lr)
        moved.append(p)
    assert all(torch.equal(each, moved[0]) for each in moved)


def test_a_rate_is_rounded_for_each_parameter_by_itself() -> None:
    """In float64 0.1 is another number than in float32, whatever the parameters before this one."""
    moved = []
    for dtypes in ((torch.float64,), (torch.float32, torch.float64)):
        params = [torch.ones(3, dtype=dtype) for dtype in dtypes]
        grads, *moments = ([torch.full_like(p, value) for p in params] for value in (0.3, 0.0, 0.0))
        none, steps = [None for _ in params], [torch.zeros(()) for _ in params]
        masked_adamw(params, grads, *moments, steps, none, none, lr=torch.tensor(0.1, dtype=torch.float64))
        moved.append(params[-1])
    assert torch.equal(*moved)
