"""The optimizer's Triton kernel against AdamW on masked copies in float64, on a GPU or interpreted on the CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from masked_copies import MaskedCopies, masks_of, parameters
from torch import Tensor

from mosa_kernels.backends import masked_adamw as reference
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.functional.masked_adamw import masked_adamw

pytest.importorskip("triton", reason="PyTorch came without Triton")
from mosa_kernels.backends.triton import masked_adamw as kernels
from mosa_kernels.backends.triton import pointers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs a CUDA device, or TRITON_INTERPRET=1 (as test_interpreted_operators.py sets it)",
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter knows no graphs and runs programs one by one")
Kind = tuple[tuple[int, ...], int | None, bool]  # shape, experts or None, whether entries have owners
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}
"""Relative; the interpreter cuts bf16 off where a GPU rounds to nearest."""


class Group:
    """Parameters with gradients, moments and counts, drawn at random."""

    def __init__(
        self, kinds: Sequence[Kind], dtypes: Sequence[torch.dtype], seed: int = 0, history: bool = False
    ) -> None:
        self.kinds, self.generator = kinds, torch.Generator().manual_seed(seed)
        pairs = list(zip(kinds, dtypes, strict=True))
        self.params = [self.draw(shape, dtype) for (shape, *_), dtype in pairs]
        self.averages = [self.draw(p.shape, p.dtype) if history else torch.zeros_like(p) for p in self.params]
        self.squares = [self.draw(p.shape, p.dtype).square() if history else torch.zeros_like(p) for p in self.params]
        self.owners = [
            torch.randint(n, shape, generator=self.generator, dtype=torch.uint8).to(DEVICE)
            if entries and n is not None
            else None
            for shape, n, entries in kinds
        ]
        self.steps = [torch.zeros(() if n is None else (n,), device=DEVICE) for _, n, _ in kinds]
        if history:
            self.steps = [torch.randint_like(steps, 3000) for steps in self.steps]
        self.renew()

    def draw(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(DEVICE, dtype)

    def renew(self, rate: float = 0.5) -> None:
        """New gradients and flags, at new addresses."""
        self.grads = [self.draw(p.shape, p.dtype) for p in self.params]
        self.active = [
            None if n is None else ((torch.rand(n, generator=self.generator) < rate).float() * 3).to(DEVICE)
            for _, n, _ in self.kinds
        ]

    def tensors(self) -> AdamWTensors:
        columns = (self.params, self.grads, self.averages, self.squares, self.steps, self.owners, self.active)
        return AdamWTensors(*(list(column) for column in columns))  # type: ignore[arg-type]

    def state(self) -> list[list[Tensor]]:
        return [[t.clone() for t in column] for column in (self.params, self.averages, self.squares)]

    def step(self, **options: object) -> None:
        masked_adamw(*self.tensors(), **{"lr": 0.1, "eps": 1e-6, **options}, backend="triton")  # type: ignore[arg-type]

    def moves(self, index: int) -> list[bool]:
        flags = self.active[index]
        return [True] if flags is None else (flags != 0).tolist()

    def standing(self, index: int) -> Tensor:
        """The entries that no active expert owns."""
        masks = masks_of(
            self.params[index].cpu(),
            self.kinds[index][1],
            None if self.owners[index] is None else self.owners[index].cpu(),
        )
        still = torch.ones(self.params[index].shape, dtype=torch.bool)
        for mask, moved in zip(masks, self.moves(index), strict=True):
            still &= ~mask if moved else still
        return still.to(DEVICE)


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.view(integer), other.view(integer))


def assert_still(group: Group, before: list[list[Tensor]]) -> None:
    for index in range(len(group.params)):
        still = group.standing(index)
        for old, new in zip(before, (group.params, group.averages, group.squares), strict=True):
            assert same_bits(old[index][still], new[index][still])


@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(
    kinds=parameters(),
    betas=st.sampled_from(((0.9, 0.999), (0.0, 0.5), (0.8, 0.0))),
    weight_decay=st.sampled_from((0.0, 0.3)),
    tensor_lr=st.sampled_from((None, torch.float32, torch.float64)),
    rate=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_equals_adamw_on_masked_copies(kinds, betas, weight_decay, tensor_lr, rate, seed) -> None:
    group = Group(kinds, [torch.float32] * len(kinds), seed)
    copies = [
        MaskedCopies(
            p.cpu(), masks_of(p.cpu(), n, None if owner is None else owner.cpu()),
            betas=betas, eps=1e-6, weight_decay=weight_decay,
        )
        for p, (_, n, _), owner in zip(group.params, kinds, group.owners, strict=True)
    ]  # fmt: skip
    for step in range(4):
        lr = 0.1 / (1 + step)
        group.renew(rate)
        before = group.state()
        given_lr = lr if tensor_lr is None else torch.tensor(lr, dtype=tensor_lr, device=DEVICE)
        group.step(lr=given_lr, betas=betas, weight_decay=weight_decay)
        assert_still(group, before)
        for index, copy in enumerate(copies):
            copy.step(group.grads[index].cpu(), group.moves(index), lr)
    for index, copy in enumerate(copies):
        found = (group.params[index], group.averages[index], group.squares[index])
        for name, tensor in zip((None, "exp_avg", "exp_avg_sq"), found, strict=True):
            torch.testing.assert_close(tensor.double().cpu(), copy.together(name), rtol=2e-5, atol=2e-5)
        counts = [float(o.state[c].get("step", 0)) for c, o in zip(copy.copies, copy.optimizers, strict=True)]
        assert group.steps[index].reshape(-1).tolist() == counts


def mixed(seed: int = 0) -> Group:
    """Several programs a parameter, every dtype, ends that fill no vector, and more experts than one lane holds."""
    kinds: list[Kind] = [
        ((48, 64), 4, True), ((64, 48), None, False), ((4, 768), 4, False), ((1, 1025), 1, True), ((3, 700), 3, False),
        ((2049,), 200, True), ((), None, False), ((0, 4), None, False), ((7, 5), 7, False), ((5, 1000), 60, True),
    ]  # fmt: skip
    dtypes = [(torch.float32, torch.float16, torch.bfloat16)[n % 3] for n in range(len(kinds))]
    return Group(kinds, dtypes, seed, history=True)


def test_many_parameters_of_all_dtypes_with_a_history() -> None:
    """Each stored value is that of a float64 step from the stored ones, rounded once."""
    group = mixed()
    options = AdamWOptions(1e-2, 0.9, 0.999, 1e-8, 0.1)
    before, counts = group.state(), [steps.clone() for steps in group.steps]
    wide = [[t.double() for t in column] for column in (group.params, group.grads, group.averages, group.squares)]
    reference.masked_adamw(
        AdamWTensors(*wide, [c.clone() for c in counts], group.owners, group.active),
        options,  # type: ignore[arg-type]
    )
    ok, reason = kernels.supports_masked_adamw(group.tensors(), options)
    assert ok, reason
    kernels.masked_adamw(group.tensors(), options)
    assert_still(group, before)
    for index, p in enumerate(group.params):
        assert torch.equal(
            group.steps[index] - counts[index],
            torch.tensor(group.moves(index)).float().view_as(counts[index]).to(DEVICE),
        )
        for expected, found in zip(
            (wide[0], wide[2], wide[3]), (group.params, group.averages, group.squares), strict=True
        ):
            error = (found[index].double() - expected[index]).abs()
            bound = expected[index].abs() * ROUNDING[p.dtype] * 1.001 + 2e-6 * (1 + expected[index].abs())
            assert (error <= bound).all(), index


def test_first_steps_of_slow_moments() -> None:
    """1 - 0.9999^t cancels in float32; what it divides must not lose five digits for it."""
    group = Group([((40,), None, False)], [torch.float32])
    wide = [[t.double() for t in column] for column in (group.params, group.grads, group.averages, group.squares)]
    reference.masked_adamw(
        AdamWTensors(*wide, [torch.zeros((), device=DEVICE)], [None], [None]), AdamWOptions(1.0, 0.99, 0.9999, 0.0, 0.0)
    )  # fmt: skip
    group.step(lr=1.0, betas=(0.99, 0.9999), eps=0.0, weight_decay=0.0)
    torch.testing.assert_close(group.params[0].double(), wide[0][0], rtol=2e-6, atol=2e-6)


def test_what_stands_still_keeps_even_its_nans_and_owners_out_of_range_stand_still() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        group = Group([((64, 33), 2, True), ((3, 50), 3, False)], [dtype] * 2, history=True)
        group.active = [torch.tensor([1.0, 0.0], device=DEVICE), torch.tensor([0.0, 0.0, 1.0], device=DEVICE)]
        assert group.owners[0] is not None
        group.owners[0][5] = 2
        group.owners[0][6] = 255
        still = [group.standing(0) | (group.owners[0] > 1), group.standing(1)]
        for index, mask in enumerate(still):
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            pattern = 0x7F812345 if dtype == torch.float32 else 0x7FA3 if dtype == torch.bfloat16 else 0x7D23
            for column in (group.params, group.averages, group.squares):
                column[index].view(integer)[mask] = pattern
            group.grads[index][mask] = torch.nan
        before = group.state()
        group.step()
        for index, mask in enumerate(still):
            for old, new in zip(before, (group.params, group.averages, group.squares), strict=True):
                assert same_bits(old[index][mask], new[index][mask])
                assert new[index][~mask].isfinite().all()


def test_addresses_that_are_not_aligned_and_strided_gradients() -> None:
    group = Group([((32, 32), 4, True)], [torch.float32])
    expected = Group([((32, 32), 4, True)], [torch.float32])
    base = torch.empty(32 * 32 + 1, device=DEVICE)
    base[1:] = group.params[0].reshape(-1)
    group.params[0] = base[1:].view(32, 32)
    group.grads[0] = group.grads[0].t().contiguous().t()
    for one in (group, expected):
        one.step()
        one.step()
    for found, wanted in zip(group.state(), expected.state(), strict=True):
        assert torch.equal(found[0], wanted[0])


def test_tables_are_used_again_and_follow_what_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[int] = []

    def counted(fields: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        uploads.append(len(fields))
        return pointers.upload(fields, device)

    monkeypatch.setattr(kernels, "upload", counted)
    group, other = mixed(1), mixed(2)
    group.step()
    assert uploads == [11, 2]
    group.step()
    assert uploads == [11, 2]  # nothing moved
    other.step()
    group.step()
    assert uploads == [11, 2, 11, 2]  # two groups take turns
    held = group.grads, group.active
    group.renew()
    group.step()
    assert uploads == [11, 2, 11, 2, 2]
    del held
    before = group.state()
    group.params = [p.clone() for p in group.params]
    group.step()
    assert uploads == [11, 2, 11, 2, 2, 11, 2]
    assert not torch.equal(before[0][0], group.params[0])


def test_no_value_is_read_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("read")

    group = mixed()
    lr = torch.tensor(0.1, device=DEVICE)
    group.step(lr=lr)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
            patch.setattr(Tensor, name, refuse)
        tensors, options = group.tensors(), AdamWOptions(lr, 0.9, 0.999, 1e-8, 0.0)
        assert kernels.supports_masked_adamw(tensors, options)[0]
        kernels.step_launch(tensors, options)


def test_what_is_declined_says_why() -> None:
    def changed(**changes: object) -> AdamWTensors:
        group = Group([((4, 6), 2, True)], [torch.float32])
        return group.tensors()._replace(**changes)

    options = AdamWOptions(0.1, 0.9, 0.999, 1e-8, 0.0)
    p = torch.zeros(4, 6, device=DEVICE)
    for tensors, reason in (
        (changed(params=[p.double()]), "torch.float64"),
        (changed(grads=[p.half()]), "differ in dtype"),
        (changed(params=[torch.zeros(6, 4, device=DEVICE).t()]), "not contiguous"),
        (changed(owners=[torch.zeros(6, 4, dtype=torch.uint8, device=DEVICE).t()]), r"owners\[0\] is not contiguous"),
        (changed(steps=[torch.zeros(300, device=DEVICE)]), "at most 256"),
        (changed(active=[torch.ones(2, dtype=torch.bool, device=DEVICE)]), r"active\[0\] is not contiguous float32"),
    ):
        ok, said = kernels.supports_masked_adamw(tensors, options)
        assert not ok
        assert re.search(reason, said)
    with pytest.raises(ValueError, match=r"backend: 'triton' does not take this call: active\[0\] is not"):
        masked_adamw(
            *changed(active=[torch.ones(2, dtype=torch.bool, device=DEVICE)]), lr=0.1, backend="triton"
        )  # fmt: skip


@needs_gpu
def test_two_hundred_runs_give_the_same_bits() -> None:
    results = []
    for _ in range(200):
        group = mixed()
        group.step()
        results.append((group.state(), [steps.clone() for steps in group.steps]))
    (first, counts), *others = results
    for state, other_counts in others:
        assert all(
            same_bits(a, b)
            for one, two in zip(first, state, strict=True)
            for a, b in zip(one, two, strict=True)
            if a.numel()
        )
        assert all(torch.equal(a, b) for a, b in zip(counts, other_counts, strict=True))


@needs_gpu
@pytest.mark.parametrize("grads_move", [False, True])
def test_a_replayed_graph_counts_on(grads_move: bool) -> None:
    """Flags, gradients, the learning rate and the counts are read anew at every replay."""
    group, eager = mixed(), mixed()
    lr = torch.tensor(0.1, device="cuda")
    for one in (group, eager):
        one.step(lr=lr)
    torch.cuda.synchronize()
    if grads_move:
        group.grads = [grad.clone() for grad in group.grads]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.step(lr=lr)
    for number in range(5):
        lr.fill_(0.1 / (2 + number))
        eager.renew()
        for mine, theirs in zip((group.grads, group.active), (eager.grads, eager.active), strict=True):
            for into, new in zip(mine, theirs, strict=True):
                if into is not None:
                    into.copy_(new)
        graph.replay()
        eager.step(lr=lr)
        for one, two in zip(group.steps, eager.steps, strict=True):
            assert torch.equal(one, two)
        for mine, theirs in zip(group.state(), eager.state(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@needs_gpu
def test_a_layer_trains_in_a_graph() -> None:
    """Forward, backward and step of a whole layer, captured with gradients that the capture allocates."""
    from mosa_kernels.nn.adapter import FusedMoSAAdapter
    from mosa_kernels.optim import MoSAAdamW

    layer = FusedMoSAAdapter(64, 8, num_experts=3, expert_per="batch").cuda()
    torch.nn.init.normal_(layer.up.weight)
    optimizer = MoSAAdamW(layer, lr=torch.tensor(0.01, device="cuda"), backend="triton")
    x = torch.randn(4, 5, 64, device="cuda")
    expert = torch.zeros((), dtype=torch.int64, device="cuda")

    def iteration() -> None:
        optimizer.zero_grad(set_to_none=True)
        layer(x, expert=expert).square().sum().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            iteration()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration()
    for chosen in (1, 2, 2, 0):
        expert.fill_(chosen)
        before = layer.up.weight.detach().clone()
        graph.replay()
        moved = layer.up.weight.detach() != before
        assert moved[layer.up.assignment == chosen].all()
        assert not moved[layer.up.assignment != chosen].any()
    assert optimizer.state[layer.up.weight]["step"].tolist() == [4, 1, 2]
