"""What the CUDA kernels leave out: right against the float64 oracle whatever the assignment, and really left out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from accuracy import all_needs, on
from calls import full_call, sparse_down
from cuda_machine import Changes, Machine, needs_compiler, on_machines, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterNeeds
from mosa_kernels.backends.cuda import adapter
from mosa_kernels.backends.cuda.owned import Owned, make_owned, owned_for
from mosa_kernels.functional.split import split

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:mosa_kernels, CUDA backend")


def owners(d: int, r: int, n: int, granularity: str) -> Tensor:
    return split((d, r), n, granularity, torch.Generator().manual_seed(2))


def sparse_at(d: int, r: int, n: int, granularity: str) -> dict[str, Tensor]:
    return {**sparse_down(d, r, n), "assignment_down": owners(r, d, n, granularity)}


class Counter:
    """Products of 16 x 16 tiles that the kernels on the host have had warps multiply."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self.total = ctypes.c_long.in_dll(ctypes.CDLL(module.__file__), "cuda_on_host_products")
        self.counted = 0

    @contextmanager
    def __call__(self) -> Iterator[Counter]:
        before = self.total.value
        yield self
        self.counted = self.total.value - before


def products(args: AdapterArguments, machine: Machine | None = None) -> tuple[int, int]:
    """Of a forward and of a backward pass."""
    launch = (machine or Machine("cpu")).launch()
    count = Counter(launch.module)
    with count() as forward:
        _, mean, rstd = adapter.adapter_forward(args, launch)
    passes = forward.counted
    with count() as backward:
        adapter.adapter_backward(args, torch.ones_like(args.x), mean, rstd, all_needs(args), launch)
    return passes, backward.counted


def kind(owned: Owned | None) -> str:
    return "all" if owned is None else "tiles" if owned.units is None else f"{owned.units.shape[1]} units"


CALLS = [
    # d, r, experts, what is left out for column, block and row
    (24, 256, 2, torch.bfloat16, ("all", "tiles", "all")),
    (17, 70, 3, torch.float32, ("32 units", "64 units", "tiles")),  # few blocks, some units and rows without an expert
    (70, 130, 3, torch.float32, ("64 units", "tiles", "all")),
    (70, 130, 3, torch.float16, ("64 units", "tiles", "all")),
    (100, 128, 8, torch.bfloat16, ("32 units", "tiles", "all")),
    (24, 64, 4, torch.float16, ("all", "all", "all")),
]


@on_machines
@pytest.mark.parametrize(("d", "r", "n", "dtype", "kinds"), CALLS)
def test_every_granularity(
    machine: Machine, d: int, r: int, n: int, dtype: torch.dtype, kinds: tuple[str, ...]
) -> None:
    """One expert for the call, then one a sample, tiles of two experts and the merged adapter among them."""
    options = {"dropout_p": 0.2, "seed_id": 3, "expert_scale": float(n), "merged_scale": 0.5}
    for granularity, wanted in zip(("column", "block", "row"), kinds, strict=True):
        options["assignment"] = owners(d, r, n, granularity)
        for ids in ((1,), (0, 1, -1)):
            expert = torch.tensor(ids[0] if len(ids) == 1 else ids)
            args = full_call(len(ids), 19, d, r, dtype, n=n, expert=expert, **options)
            assert kind(owned_for(args)) == wanted, granularity
            machine.check(args)


@on_machines
@pytest.mark.parametrize(
    ("granularity", "dtype"), [("column", torch.float32), ("column", torch.bfloat16), ("block", torch.float16)]
)
def test_other_options(machine: Machine, granularity: str, dtype: torch.dtype) -> None:
    d, r, n = 40, 72, 4
    scale = torch.tensor(0.7, requires_grad=True)
    whole = {"assignment": owners(d, r, n, granularity), "expert": torch.tensor([3, -1, 0, 3])}
    machine.check(full_call(4, 20, d, r, dtype, **whole, scale_tensor=scale, **sparse_at(d, r, n, granularity)))
    machine.check(full_call(4, 5, d, r, dtype, **whole, norm_weight=None, norm_bias=None, b_up=None, b_down=None))
    machine.check(full_call(4, 35, d, r, dtype, **{**whole, "expert": None}, expert_id=2, scale_tensor=scale))
    machine.check(full_call(4, 3, d, r, dtype, **{**whole, "expert": None}))
    machine.check(full_call(4, 3, d, r, dtype, torch.float32, **whole))
    down_alone = {**sparse_at(d, r, n, granularity), "assignment": None}
    machine.check(full_call(4, 20, d, r, dtype, expert=whole["expert"], **down_alone))


@on_machines
def test_only_the_gradients_asked_for(machine: Machine) -> None:
    for granularity in ("column", "block"):
        scale = torch.tensor(0.7, requires_grad=True)
        whole = {"assignment": owners(24, 80, 4, granularity), "expert": torch.tensor([0, -1, 2])}
        args = on(full_call(3, 20, 24, 80, **whole, scale_tensor=scale), machine.device)
        grad_out = torch.randn_like(args.x)
        _, full = machine.run(args, grad_out)
        for wish in ({"x"}, {"w_up"}, {"w_down", "b_down"}, {"scale"}, {"b_up"}):
            _, found = machine.run(args, grad_out, AdapterNeeds(*(name in wish for name in AdapterNeeds._fields)))
            for name in wish:
                torch.testing.assert_close(getattr(found, name), getattr(full, name), rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [None, (0, -1, 2)])
def test_a_warm_up_loads_the_kernels_of_the_graph(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ids: tuple[int, ...] | None
) -> None:
    """A graph has no tables, and so other kernels than the calls before it; on the default stream none is warmed up."""
    launch = Machine("cpu").launch()
    assert launch.module.__file__ is not None
    library = ctypes.CDLL(launch.module.__file__)
    expert = {"expert_id": 1} if ids is None else {"expert": torch.tensor(ids)}
    args = full_call(3, 19, 70, 130, dtype, n=3, assignment=owners(70, 130, 3, "column"), **expert)

    def both_passes(stream: int) -> None:
        on_stream = launch._replace(stream=stream)
        _, mean, rstd = adapter.adapter_forward(args, on_stream)
        adapter.adapter_backward(args, torch.ones_like(args.x), mean, rstd, all_needs(args), on_stream)

    for stream, further in ((0, True), (1, False)):
        library.cuda_on_host_unload()
        both_passes(stream)
        loaded = library.cuda_on_host_loaded()
        with monkeypatch.context() as captured:
            captured.setattr(adapter, "owned_for", lambda args: None)
            both_passes(stream)
        assert (library.cuda_on_host_loaded() > loaded) is further


def irregular(d: int = 40, r: int = 80) -> Tensor:
    """Expert 2 owns two entries, 3 and 5 nothing, 4 half of the units, of which it shares one."""
    assignment = torch.full((d, r), 1, dtype=torch.uint8)
    assignment[:, :20] = 0
    assignment[:, 48:] = 4
    assignment[5, 3] = assignment[7, 50] = 2
    return assignment


@on_machines
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_own_little_or_nothing(machine: Machine, dtype: torch.dtype) -> None:
    args = full_call(
        6, 9, 40, 80, dtype, n=6, assignment=irregular(), expert=torch.tensor([0, 2, 5, 4, 3, 200]), b_up=None
    )
    owned = owned_for(args)
    assert owned is not None
    assert owned.units is not None
    assert [int((row < 80).sum()) for row in owned.units] == [20, 28, 2, 0, 32]
    assert owned.units[2, :2].tolist() == [3, 50]
    machine.check(args)
    blocks = torch.full((40, 80), 7, dtype=torch.uint8)  # 0 to 6 own one entry or nothing
    blocks[0, 0], blocks[39, 79], blocks[16:32, 16:48] = 0, 1, 3
    args = full_call(5, 9, 40, 80, dtype, n=9, assignment=blocks, expert=torch.tensor([0, 1, 2, 8, 3]))
    assert kind(owned_for(args)) == "tiles"
    machine.check(args)


@on_machines
@settings(max_examples=8)
@given(
    dtype=st.sampled_from(DTYPES), d=st.integers(8, 70), r=st.integers(65, 256), n=st.integers(2, 8),
    side=st.sampled_from((1, 8, 16, 24, 64)), length=st.integers(1, 40), data=st.data(),
)  # fmt: skip
def test_any_assignment(
    machine: Machine, dtype: torch.dtype, d: int, r: int, n: int, side: int, length: int, data: st.DataObject
) -> None:
    """Rectangles of random owners, at every share of what is owned, with some rows, columns and entries of others."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def drawn(*shape: int) -> Tensor:
        return torch.randint(n, shape, generator=generator, dtype=torch.uint8)

    assignment = drawn(-(-d // side), -(-r // side)).repeat_interleave(side, 0).repeat_interleave(side, 1)
    assignment = assignment[:d, :r].contiguous()
    if data.draw(st.booleans()):
        assignment = drawn(r).expand(d, r).contiguous()
    assignment[torch.randint(d, (3,)), torch.randint(r, (3,))] = drawn(3)
    ids = torch.randint(-1, n, (data.draw(st.sampled_from((1, 2, 5))),), generator=generator)
    machine.check(full_call(len(ids), length, d, r, dtype, n=n, assignment=assignment, expert=ids))


@on_machines
@pytest.mark.parametrize("granularity", ["column", "block"])
def test_the_bits_do_not_depend_on_what_memory_held(machine: Machine, granularity: str) -> None:
    options = {"assignment": owners(48, 80, 4, granularity), "expert": torch.tensor((0, 1, -1, 3, 1))}
    args = on(full_call(5, 14, 48, 80, torch.float16, **options), machine.device)
    grad_out = torch.randn_like(args.x)
    first, second = (tensors_of(*machine.run(args, grad_out)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


LEFT = [
    # granularity, r, experts, and the shares of the forward and of the backward pass
    ("column", 128, 4, 1 / 4, 1 / 4),
    ("column", 256, 4, 1 / 4, 1 / 4),
    ("column", 128, 3, 1 / 2, 1 / 2),  # 43 units, padded to 64
    ("column", 256, 3, 1, 1),  # 86, for which there is no kernel
    ("block", 128, 4, (1 + 1 / 4) / 2, (3 + 2 / 4) / 5),
    ("block", 256, 2, (1 + 1 / 2) / 2, (3 + 2 / 2) / 5),
    ("row", 128, 4, 1, 1),
    ("element", 128, 4, 1, 1),
    ("even_columns", 128, 4, 1, 1),
]


@needs_compiler
@pytest.mark.parametrize(("granularity", "r", "n", "forward", "backward"), LEFT)
def test_how_many_products_are_left(granularity: str, r: int, n: int, forward: float, backward: float) -> None:
    """Where the tiles fit and every expert owns as many."""
    d, length = 128, 64
    whole = length * d * r // 16**3
    args = full_call(1, length, d, r, torch.bfloat16, n=n, assignment=owners(d, r, n, granularity))
    expert = torch.tensor(1)
    assert products(args._replace(expert=expert)) == (2 * whole * forward, 5 * whole * backward)


@needs_compiler
@pytest.mark.parametrize(("granularity", "left"), [("column", 1 / 4), ("block", 5 / 8)])
def test_how_many_products_mixed_tokens_leave(granularity: str, left: float) -> None:
    """A tile of an expert's tokens and one of merged ones; of float32, three TF32 products at half the depth each."""
    d, r, length = 64, 128, 64
    whole = 6 * length * d * r // 16**3
    options = {"assignment": owners(d, r, 4, granularity), "expert": torch.tensor([2, -1])}
    forward, _ = products(full_call(2, length, d, r, **options))
    assert forward == 2 * whole * (1 + left)


EVERYTHING: Changes = {
    "adapter_forward_bf16.cu": (
        '#include "adapter_forward_launch.h"',
        '#include "adapter.h"\n#define kNarrowRank 256\n#include "adapter_forward_launch.h"',
    )
}
"""No tile is left out where the forward pass multiplies bf16."""


@needs_compiler
def test_products_that_are_not_left_out_are_found() -> None:
    """A test of these tests."""
    args = full_call(1, 64, 64, 128, torch.bfloat16, assignment=owners(64, 128, 4, "block"), expert=torch.tensor(1))
    whole = products(args._replace(assignment=owners(64, 128, 4, "element")))
    assert products(args) == (whole[0] * 5 // 8, whole[1] * 7 // 10)
    assert products(args, Machine("cpu", EVERYTHING)) == (whole[0], whole[1] * 7 // 10)


@needs_compiler
@pytest.mark.parametrize("granularity", ["column", "block"])
def test_a_wrong_table_is_found(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of these tests: one unit, or one tile, too few."""
    args = full_call(2, 20, 64, 128, assignment=owners(64, 128, 4, granularity), expert=torch.tensor(1))
    owned = owned_for(args)
    assert owned is not None
    table = next(table for table in owned if table is not None).clone()
    if owned.units is not None:
        table[1, 5] = 128
    else:
        table[1, 2] &= table[1, 2] - 1
    monkeypatch.setattr(adapter, "owned_for", lambda _: Owned(*(None if old is None else table for old in owned)))
    with pytest.raises(AssertionError, match="error"):
        Machine("cpu").check(args)


def test_tables_follow_the_assignment() -> None:
    args = full_call(1, 3, 160, 80, assignment=owners(160, 80, 4, "column"), expert=torch.tensor(1))
    assignment = args.assignment
    assert assignment is not None
    first = owned_for(args)
    assert kind(first) == "32 units"
    assert owned_for(args) is first
    assert owned_for(args._replace(expert=None)) is None  # the merged adapter needs all units
    assert owned_for(args._replace(expert=None, expert_id=2)) is first
    assert owned_for(args._replace(assignment=None)) is None
    for granularity, wanted in (("block", "tiles"), ("row", "all"), ("element", "all"), ("even_rows", "all")):
        assignment.copy_(owners(160, 80, 4, granularity))
        assert kind(owned_for(args)) == wanted, granularity
    with torch.inference_mode():
        assert owned_for(args._replace(assignment=owners(160, 80, 4, "column"))) is None


def test_bits_of_tiles() -> None:
    assignment = torch.full((20, 250), 3, dtype=torch.uint8)
    assignment[17:, 240:] = 0
    assignment[0, 0] = assignment[5, 40] = 1
    owned = make_owned(assignment)
    assert owned is not None
    assert owned.tiles is not None
    assert (owned.tiles.int() & 0xFFFF).tolist() == [[0, 1 << 15], [1 | 1 << 2, 0], [0, 0], [0xFFFF, 0xFFFF]]
