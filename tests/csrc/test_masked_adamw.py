"""The optimizer's kernels against AdamW on masked copies in float64: CUDA's, on the host and a GPU, and the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cuda_on_host
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_copies import MaskedCopies, masks_of, parameters
from torch import Tensor

from mosa_kernels._extension import extension
from mosa_kernels.backends.cpu import masked_adamw as cpu
from mosa_kernels.backends.cuda import masked_adamw as cuda
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.masked_adamw_kernels import takes
from mosa_kernels.functional.masked_adamw import masked_adamw

Kind = tuple[tuple[int, ...], int | None, bool]  # shape, experts or None, whether entries have owners
Step = Callable[[AdamWTensors, AdamWOptions], None]
VIT: tuple[Kind, ...] = (
    *(((768,), None, False), ((768,), None, False)),
    *(((64, 768), None, False), ((64,), None, False)),
    *(((768, 64), 4, True), ((4, 768), 4, False)),
)
OPTIONS = AdamWOptions(0.1, 0.9, 0.999, 1e-6, 0.05)
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half of the smallest subnormal
needs_compiler = pytest.mark.skipif(cuda_on_host.find_compiler() is None, reason="no C++ compiler")
needs_extension = pytest.mark.skipif(extension().reason is not None, reason=str(extension().reason))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def step_on_host(tensors: AdamWTensors, options: AdamWOptions, large: bool = True, **build: object) -> None:
    """The kernel with the very arguments that a GPU would get."""
    ok, reason = takes(tensors, options)
    assert ok, reason
    ticket = torch.zeros(1, dtype=torch.int32)
    cuda.launch(cuda_on_host.build("masked_adamw", **build), tensors, options, ticket, large, 0, 0)  # type: ignore[arg-type]
    assert ticket.item() == 0


def step_on_gpu(tensors: AdamWTensors, options: AdamWOptions) -> None:
    masked_adamw(
        *tensors,
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        backend="cuda",
    )


def step_compiled(tensors: AdamWTensors, options: AdamWOptions) -> None:
    ok, reason = cpu.supports_masked_adamw(tensors, options)
    assert ok, reason
    cpu.masked_adamw(tensors, options)


class Machine(NamedTuple):
    device: str
    step: Step


MACHINES = [
    pytest.param(Machine("cpu", step_on_host), id="cuda_on_host", marks=needs_compiler),
    pytest.param(Machine("cuda", step_on_gpu), id="gpu", marks=[pytest.mark.gpu, needs_gpu]),
    pytest.param(Machine("cpu", step_compiled), id="cpu", marks=needs_extension),
]


def drawn(
    kinds: Sequence[Kind], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, rate: float = 0.5
) -> AdamWTensors:
    """Parameters with gradients, moments and counts of a run that has gone on for a while."""
    g = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    shapes = [shape for shape, *_ in kinds]
    counts = [() if n is None else (n,) for _, n, _ in kinds]
    return AdamWTensors(
        [normal(shape) for shape in shapes],
        [normal(shape) for shape in shapes],
        [normal(shape) for shape in shapes],
        [normal(shape).square() for shape in shapes],
        [torch.randint(2000, count, generator=g).float().to(device) for count in counts],
        [
            torch.randint(n, shape, generator=g, dtype=torch.uint8).to(device) if owned and n is not None else None
            for shape, n, owned in kinds
        ],
        [None if n is None else (torch.rand(n, generator=g) < rate).float().to(device) for _, n, _ in kinds],
    )


def copied(tensors: AdamWTensors, convert: Callable[[Tensor], Tensor] = torch.clone) -> AdamWTensors:
    return AdamWTensors(*([None if t is None else convert(t) for t in column] for column in tensors))  # type: ignore[arg-type]


def moving_entries(tensors: AdamWTensors, kinds: Sequence[Kind], index: int) -> tuple[Tensor, Tensor]:
    """Per entry of a parameter whether it moves, and its step count after the step, float64."""
    p, owner, active = tensors.params[index], tensors.owners[index], tensors.active[index]
    moves = torch.zeros(p.shape, dtype=torch.bool, device=p.device)
    counts = torch.ones(p.shape, dtype=torch.float64, device=p.device)
    flags = torch.ones_like(tensors.steps[index]) if active is None else active
    for expert, mask in enumerate(masks_of(p, kinds[index][1], owner)):
        mask = mask.to(p.device)
        moves |= mask & (flags.reshape(-1)[expert] != 0)
        counts[mask] = tensors.steps[index].reshape(-1)[expert].double() + 1
    return moves, counts


def assert_one_step(before: AdamWTensors, after: AdamWTensors, kinds: Sequence[Kind], options: AdamWOptions) -> None:
    """`after` against Eq. 4 in float64, what stands still bit by bit."""
    lr, beta1, beta2, eps, decay = (float(value) for value in options)
    for i, p in enumerate(before.params):
        moves, count = moving_entries(before, kinds, i)
        g, m, v = before.grads[i].double(), before.exp_avgs[i].double(), before.exp_avg_sqs[i].double()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        change = lr * (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + eps)
        wanted = ((1 - lr * decay) * p.double() - change, m, v)
        rounding, arithmetic = torch.finfo(p.dtype).eps, 8 * torch.finfo(torch.float32).eps
        summands = (change.abs() + p.abs(), g.abs() + m.abs(), g * g + v)
        for old, new, want, sizes in zip(
            (p, before.exp_avgs[i], before.exp_avg_sqs[i]),
            (after.params[i], after.exp_avgs[i], after.exp_avg_sqs[i]),
            wanted,
            summands,
            strict=True,
        ):
            assert torch.equal(bits(new)[~moves], bits(old)[~moves])
            excess = (new.double() - want).abs() - rounding * want.abs() - arithmetic * sizes - SMALLEST[p.dtype]
            assert not (excess[moves] > 0).any(), excess.max()
        flags = torch.ones_like(before.steps[i]) if before.active[i] is None else before.active[i] != 0
        assert torch.equal(after.steps[i], before.steps[i] + flags)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("machine", MACHINES)
@settings(max_examples=40)
@given(
    kinds=parameters(),
    betas=st.sampled_from(((0.9, 0.999), (0.0, 0.5), (0.8, 0.0))),
    weight_decay=st.sampled_from((0.0, 0.3)),
    lr_dtype=st.sampled_from((None, torch.float32, torch.float64)),
    rate=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_equals_adamw_on_masked_copies(machine, kinds, betas, weight_decay, lr_dtype, rate, seed) -> None:
    generator, (device, step) = torch.Generator().manual_seed(seed), machine
    tensors = drawn(kinds, device=device, seed=seed)
    for column in (tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps):
        torch._foreach_zero_(column)
    copies = [
        MaskedCopies(p.cpu(), masks_of(p.cpu(), n, None if owner is None else owner.cpu()),
                     betas=betas, eps=1e-6, weight_decay=weight_decay)
        for p, (_, n, _), owner in zip(tensors.params, kinds, tensors.owners, strict=True)
    ]  # fmt: skip
    for number in range(4):
        lr = 0.1 / (1 + number)
        grads = [torch.randn(p.shape, generator=generator) for p in tensors.params]
        active = [None if n is None else (torch.rand(n, generator=generator) < rate).float() * 3 for _, n, _ in kinds]
        for copy, grad, flags in zip(copies, grads, active, strict=True):
            copy.step(grad, [True] if flags is None else (flags != 0).tolist(), lr)
        tensors = tensors._replace(
            grads=[grad.to(device) for grad in grads], active=[None if a is None else a.to(device) for a in active]
        )
        given_lr = lr if lr_dtype is None else torch.tensor(lr, dtype=lr_dtype, device=device)
        step(tensors, AdamWOptions(given_lr, *betas, 1e-6, weight_decay))
    for i, copy in enumerate(copies):
        for name, column in (
            (None, tensors.params),
            ("exp_avg", tensors.exp_avgs),
            ("exp_avg_sq", tensors.exp_avg_sqs),
        ):
            torch.testing.assert_close(column[i].cpu().double(), copy.together(name), rtol=2e-5, atol=2e-5)
        counts = [float(o.state[c].get("step", 0)) for c, o in zip(copy.copies, copy.optimizers, strict=True)]
        assert tensors.steps[i].reshape(-1).tolist() == counts


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_of_an_adapter_of_many_blocks(machine: Machine, dtype: torch.dtype) -> None:
    before = drawn(VIT, dtype, machine.device)
    after = copied(before)
    machine.step(after, OPTIONS)
    assert_one_step(before, after, VIT, OPTIONS)


EDGES: tuple[Kind, ...] = (
    *(((size,), None, False) for size in (1, 7, 8, 9, 2047, 2048, 2049, 4096)),
    *(((size,), 3, True) for size in (5, 2048, 2055)),
    *(((n, size), n, False) for n, size in ((3, 1), (7, 5), (2, 1025), (5, 2048))),
    *(((300,), 255, True), ((256, 9), 256, False), ((0, 4), None, False), ((3, 0), 3, False), ((0,), 2, True)),
)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_sizes_and_addresses_off_the_vectors(machine: Machine, dtype: torch.dtype, offset: int) -> None:
    """Views that begin one element later have addresses that no 16-byte access may use."""
    before = drawn(EDGES, dtype, machine.device, seed=1)
    room = copied(before, lambda t: t.new_zeros(t.numel() + 2))
    after = AdamWTensors(*(
        [None if t is None else r[offset : offset + t.numel()].view(t.shape).copy_(t)
         for t, r in zip(column, rooms, strict=True)]
        for column, rooms in zip(before, room, strict=True)
    ))  # fmt: skip
    machine.step(after, OPTIONS)
    assert_one_step(before, after, EDGES, OPTIONS)
    for column in room:
        for r in column:
            assert r is None or (r[:offset] == 0).all()
            assert r is None or (r[len(r) - 2 + offset :] == 0).all()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("count", [1, 1000, 1_000_000])
def test_bias_corrections_early_and_late(machine: Machine, count: int) -> None:
    """1 - 0.999^t loses four digits at t = 1 when it is taken as a difference."""
    kinds: tuple[Kind, ...] = (((500,), 2, True),)
    before = drawn(kinds, device=machine.device, rate=1.0)
    before.steps[0].fill_(count - 1)
    after = copied(before)
    machine.step(after, OPTIONS._replace(lr=1.0, weight_decay=0.0))
    assert_one_step(before, after, kinds, OPTIONS._replace(lr=1.0, weight_decay=0.0))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(machine: Machine, dtype: torch.dtype) -> None:
    """The arithmetic is in float32: stored values are those of a float32 step, rounded."""
    narrow = drawn(VIT, dtype, machine.device)
    wide = copied(narrow, lambda t: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True))
    for tensors in (narrow, wide):
        machine.step(tensors, OPTIONS)
    for column in ("params", "exp_avgs", "exp_avg_sqs"):
        for one, other in zip(getattr(narrow, column), getattr(wide, column), strict=True):
            assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_stands_still_keeps_every_bit(machine: Machine, dtype: torch.dtype) -> None:
    """Whatever it holds, NaNs with a payload too, and whatever its gradient is."""
    integer = {4: torch.int32, 2: torch.int16}[torch.empty(0, dtype=dtype).element_size()]
    patterns = torch.arange(2**16).mul(65537 if dtype == torch.float32 else 1).to(integer).view(dtype)
    owner = (torch.arange(2**16) % 3).to(torch.uint8)
    owner[owner == 2] = 200  # of no expert
    active, grad = torch.tensor([0.0, 1.0]), torch.where(owner == 1, 1.0, torch.nan).to(dtype)
    columns = (patterns, grad, patterns.clone(), patterns.clone(), torch.zeros(2), owner, active)
    tensors = AdamWTensors(*([t.to(machine.device).clone()] for t in columns))
    machine.step(tensors, OPTIONS)
    still = owner != 1
    for column in (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs):
        assert torch.equal(bits(column[0].cpu())[still], bits(patterns)[still])
        assert not torch.equal(bits(column[0].cpu())[~still], bits(patterns)[~still])
    assert tensors.steps[0].tolist() == [0, 1]


@needs_compiler
@pytest.mark.parametrize("large", [False, True])
def test_more_tensors_than_a_launch_takes(large: bool) -> None:
    """48 adapters of 6 tensors fit into one launch where the driver takes 32 KiB of parameters."""
    small, most = cuda_on_host.build("masked_adamw").adamw_tensors_per_launch
    assert most >= 6 * 48
    assert small >= 50
    kinds = [EDGES[n % 8] if n % 3 else ((2, 3), 2, bool(n % 2)) for n in range(most + small + 3)]
    before = drawn(kinds)
    after = copied(before)
    step_on_host(after, OPTIONS, large)
    assert_one_step(before, after, kinds, OPTIONS)


@needs_compiler
def test_an_lr_of_the_host_and_strided_gradients() -> None:
    kinds: tuple[Kind, ...] = (((6, 4), 2, True),)
    before = drawn(kinds)
    after = copied(before)._replace(grads=[before.grads[0].t().contiguous().t()])
    step_on_host(after, OPTIONS._replace(lr=torch.tensor(0.1, dtype=torch.float64)))
    assert_one_step(before, after, kinds, OPTIONS)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("last = ticket == gridDim.x - 1", "last = ticket < gridDim.x"),
        ("owners[n] < t.experts ?", "owners[n] < 255 ?"),
        ("if (first + static_cast<uint32_t>(n) == next)", "if (first + static_cast<uint32_t>(n) == next + 1)"),
        ("if (!any) return;", "if (any) return;"),
    ],
)
def test_a_broken_kernel_is_found(right: str, wrong: str) -> None:
    """A test of these tests."""
    kinds = (*EDGES, ((2**12,), 2, True))
    before = drawn(kinds)
    owner = before.owners[-1]
    assert owner is not None
    owner[::2] = torch.arange(2048).remainder(253).add(3).to(torch.uint8)  # of no expert
    after = copied(before)
    step_on_host(after, OPTIONS, changes={"masked_adamw.cu": (right, wrong)})
    with pytest.raises(AssertionError):
        assert_one_step(before, after, kinds, OPTIONS)


def test_what_the_kernel_does_not_take() -> None:
    def reason(**changes: object) -> str:
        ok, why = takes(drawn(VIT)._replace(**changes), OPTIONS)
        assert not ok
        return why

    good = drawn(VIT)
    assert takes(good, OPTIONS) == (True, "")
    assert "params[0] is torch.float64" in reason(params=[t.double() for t in good.params])
    assert "differ in dtype" in reason(exp_avgs=[t.half() for t in good.exp_avgs])
    assert "params[2] or a moment of it is not contiguous" in reason(
        params=[t.mT if t.dim() == 2 else t for t in good.params]
    )
    assert "steps[0] is not contiguous float32" in reason(steps=[t.double() for t in good.steps])
    assert "active[4] is not contiguous float32" in reason(
        active=[None if t is None else t.bool() for t in good.active]
    )
    assert "owners[4] is not contiguous" in reason(
        owners=[None if t is None else t.t().contiguous().t() for t in good.owners]
    )
    assert "lr is torch.float16" in takes(good, OPTIONS._replace(lr=torch.tensor(0.1).half()))[1]
    assert "not on a CUDA device" in cuda.supports_masked_adamw(good, OPTIONS)[1]


@needs_compiler
@pytest.mark.skipif(cuda_on_host.watching_environment("races") is None, reason="no C++ compiler that watches races")
def test_a_race_that_no_result_shows_is_found() -> None:
    """Without the fence the block that counts up the steps might do so before another has read them."""
    without = {"masked_adamw.cu": ("    __threadfence();\n    ticket", "    ticket")}
    tensors, wanted = drawn(VIT), drawn(VIT)
    step_on_host(wanted, OPTIONS)
    step_on_host(tensors, OPTIONS, changes=without)
    assert all(torch.equal(a, b) for a, b in zip(tensors.params, wanted.params, strict=True))
    with pytest.raises(RuntimeError, match=r"a data race in global memory: .* at masked_adamw\.cu:"):
        step_on_host(tensors, OPTIONS, changes=without, watch="races")


@needs_compiler
def test_launch_errors_name_launch_shape_and_cause() -> None:
    tensors = drawn((((4, 3), 4, False),))
    ticket, module = torch.zeros(1, dtype=torch.int32), cuda_on_host.build("masked_adamw")
    with pytest.raises(
        RuntimeError, match=r"masked_adamw_cuda of 1 tensors, .*of 12 entries failed: an expert that does"
    ):
        cuda.launch(module, tensors._replace(steps=[torch.zeros(5)]), OPTIONS, ticket, True, 0, 0)
    with pytest.raises(ValueError, match="experts: expected at most 256, got 300"):
        cuda.launch(module, tensors._replace(steps=[torch.zeros(300)]), OPTIONS, ticket, True, 0, 0)


@pytest.mark.gpu
@needs_gpu
def test_repeats_bitwise_and_counts_exactly() -> None:
    start = drawn(VIT * 48, device="cuda")
    first: AdamWTensors | None = None
    for _ in range(200):
        tensors = copied(start)
        step_on_gpu(tensors, OPTIONS)
        first = first or tensors
        assert all(torch.equal(a, b) for a, b in zip(tensors.params, first.params, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(tensors.steps, first.steps, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_reads_gradients_flags_and_lr_anew() -> None:
    captured = drawn(VIT * 12, device="cuda")
    eager, lr = copied(captured), torch.tensor(0.0, device="cuda")
    step_on_gpu(copied(captured), OPTIONS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_on_gpu(captured, OPTIONS._replace(lr=lr))
    for number in range(3):
        fresh = drawn(VIT * 12, device="cuda", seed=10 + number)
        for tensors in (captured, eager):
            for column in ("grads", "active"):
                for to, value in zip(getattr(tensors, column), getattr(fresh, column), strict=True):
                    if to is not None:
                        to.copy_(value)
        lr.fill_(0.1 / (1 + number))
        graph.replay()
        step_on_gpu(eager, OPTIONS._replace(lr=lr))
    for column in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        for one, other in zip(getattr(captured, column), getattr(eager, column), strict=True):
            assert torch.equal(one, other)
