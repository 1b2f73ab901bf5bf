"""The adapter's backward pass in one launch by clusters of blocks against the float64 oracle.

Compiled for the host, and on a GPU where there is one with clusters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from accuracy import Expected, all_needs, on, well_conditioned
from calls import full_call, hard_tokens, relu_call, sparse_down
from cases import adapter_calls
from cuda_machine import TWO_RANKS, Machine, check_only_experts_that_ran, needs_compiler, tensors_of
from cuda_on_host import WATCH
from hypothesis import Phase, assume, given, settings
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments, AdapterGradients, AdapterNeeds
from mosa_kernels.backends.cuda import adapter

ROOT = Path(__file__).resolve().parents[3]
HALVES = (torch.float16, torch.bfloat16)
LAUNCH = '#include "adapter_backward_cluster_launch.h"'
has_clusters = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.filterwarnings("ignore:mosa_kernels, CUDA backend")


@pytest.fixture(autouse=True)
def one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "ONE_LAUNCH", True)


class Module:
    """The compiled module, which says whether the call has taken one launch."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.one_launch: bool | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, name)

    def adapter_cuda_backward(self, *arguments: object) -> None:
        self.one_launch = self.module.adapter_cuda_in_one_launch(*arguments[:-1])
        self.module.adapter_cuda_backward(*arguments)


class ClusterMachine(Machine):
    def launch(self) -> adapter.Launch:
        launch = super().launch()
        self.module = Module(launch.module)
        return launch._replace(module=cast(ModuleType, self.module))

    def run(
        self, args: AdapterArguments, grad_out: Tensor, needs: AdapterNeeds | None = None, one_launch: bool = True
    ) -> tuple[Tensor, AdapterGradients]:
        found = super().run(args, grad_out, needs)
        assert self.module.one_launch == one_launch
        return found


HOST = pytest.param(ClusterMachine("cpu"), id="cuda_on_host", marks=needs_compiler)
GPU = pytest.param(
    ClusterMachine("cuda"),
    id="gpu",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not has_clusters, reason="needs a GPU of compute capability 9.0")],
)
on_machines = pytest.mark.parametrize("machine", [HOST, GPU])


@on_machines
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(args=adapter_calls(dtypes=HALVES, max_width=150))
def test_any_call(machine: ClusterMachine, args: AdapterArguments) -> None:
    # Over a handful of numbers luck decides between two rounding errors.
    assume(min(args.width, args.x.numel() // args.width) >= 6)
    if args.activation == "relu":  # where rounding decides the slope near zero
        args = args._replace(activation="silu")
    args = args._replace(assignment_down=None, w_down_init=None)
    machine.check(well_conditioned(args))


@on_machines
@pytest.mark.parametrize(
    ("batch", "length", "d", "r"),
    [
        *((1, 1, 16, 1), (1, 33, 128, 64), (5, 31, 136, 33)),
        *((1, 300, 72, 20), (1, 70, 300, 32), (1, 40, 1000, 17)),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_shapes_of_several_tiles(
    machine: ClusterMachine, batch: int, length: int, d: int, r: int, dtype: torch.dtype
) -> None:
    machine.check(full_call(batch, length, d, r, dtype, expert=torch.tensor(2)))


@on_machines
@pytest.mark.parametrize(
    ("ids", "length"), [((0, 1, -1, 3, 1), 1), ((0, 1, -1, 3, 1), 14), ((-1, 0, 0), 40), ((2, 2), 3)]
)
@pytest.mark.parametrize("r", [8, 40])
def test_experts_mixed_with_the_merged_adapter(
    machine: ClusterMachine, ids: tuple[int, ...], length: int, r: int
) -> None:
    args = full_call(
        len(ids), length, 144, r, torch.bfloat16, expert=torch.tensor(ids), expert_scale=4.0, merged_scale=0.25,
        scale_tensor=torch.tensor(0.7, requires_grad=True),
    )  # fmt: skip
    check_only_experts_that_ran(args, machine.check(args), ids)


@on_machines
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_in_float32(machine: ClusterMachine, dtype: torch.dtype) -> None:
    machine.check(full_call(2, 30, 136, 16, dtype, torch.float32, compute_dtype=dtype, expert=torch.tensor([1, -1])))


@on_machines
@pytest.mark.parametrize("dtype", HALVES)
def test_outlier_columns_and_a_mean_far_from_zero(machine: ClusterMachine, dtype: torch.dtype) -> None:
    outliers, shifted = hard_tokens(136, [0, 17, 130])
    machine.check(full_call(2, 20, 136, 16, dtype, x=outliers.to(dtype).requires_grad_()))
    machine.check(full_call(2, 20, 136, 16, dtype, x=shifted.to(dtype).requires_grad_()))


@on_machines
def test_relu_in_half_precision(machine: ClusterMachine) -> None:
    machine.check(relu_call(136, torch.float16))


@on_machines
def test_dropout_with_a_seed_for_each_sample(machine: ClusterMachine) -> None:
    seeds = torch.tensor([5, 2**40 + 1, 2**62])
    for seed in (None, seeds, seeds[1]):
        machine.check(full_call(3, 20, 32, 12, torch.bfloat16, dropout_p=0.4, seed=seed, seed_id=2**35 + 17))


@on_machines
def test_rows_apart_and_addresses_off_the_vectors(machine: ClusterMachine) -> None:
    wide = torch.randn(2, 21, 304, generator=torch.Generator().manual_seed(7)).to(machine.device, torch.bfloat16)
    for x in (wide[..., 8:144], wide[:, 1:, :133]):
        args = on(full_call(2, x.shape[1], x.shape[2], 8, torch.bfloat16), machine.device)
        args = args._replace(x=x.detach().requires_grad_(), residual=None)
        for grad_out in (torch.randn_like(x), torch.tensor(0.25, dtype=x.dtype, device=x.device).expand(x.shape)):
            Expected(args, grad_out).check_gradients(machine.run(args, grad_out)[1])


@on_machines
def test_only_the_gradients_asked_for(machine: ClusterMachine) -> None:
    scale = torch.tensor(0.7, requires_grad=True)
    args = full_call(2, 9, 136, 6, torch.float16, expert=torch.tensor([1, 3]), scale_tensor=scale)
    args = on(args, machine.device)
    grad_out = torch.randn_like(args.x)
    _, full = machine.run(args, grad_out)
    for wish in ({"x", "w_down"}, {"x", "norm_bias", "activity"}, {"x", "w_up"}, {"x", "scale"}):
        _, found = machine.run(args, grad_out, AdapterNeeds(*(name in wish for name in AdapterNeeds._fields)))
        for name in AdapterNeeds._fields:
            gradient = getattr(found, name)
            assert (gradient is not None) == (name in wish), name
            assert gradient is None or torch.equal(gradient, getattr(full, name)), name


@on_machines
def test_the_bits_do_not_depend_on_what_memory_held(machine: ClusterMachine) -> None:
    args = on(full_call(5, 40, 264, 40, torch.float16, expert=torch.tensor((0, 1, -1, 3, 1))), machine.device)
    grad_out = torch.randn_like(args.x)
    first, second = (tensors_of(*machine.run(args, grad_out)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@on_machines
def test_what_other_launches_take(machine: ClusterMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    call = full_call(2, 9, 64, 16, torch.bfloat16)
    needs = all_needs(call)
    none = AdapterNeeds(**dict.fromkeys(AdapterNeeds._fields, False))
    for args, wish in (
        (full_call(2, 9, 64, 16), needs),  # float32 products
        (full_call(2, 9, 64, 16, compute_dtype=torch.bfloat16), needs),
        (full_call(1, 2, 1032, 16, torch.bfloat16), needs),
        (full_call(2, 9, 64, 65, torch.bfloat16), needs),
        (full_call(2, 9, 64, 16, torch.bfloat16, **sparse_down(64, 16)), needs),
        (call, none._replace(x=True)),
        (call, needs._replace(x=False)),
    ):
        args = on(args, machine.device)
        machine.run(args, torch.ones_like(args.x), wish, one_launch=False)
    monkeypatch.setattr(adapter, "ONE_LAUNCH", False)
    machine.run(on(call, machine.device), torch.ones_like(call.x).to(machine.device), one_launch=False)


@needs_compiler
def test_code_made_from_the_ptx_of_an_older_gpu_has_no_clusters() -> None:
    """As where TORCH_CUDA_ARCH_LIST is 8.0+PTX and the GPU an H100: the kernel is there, and does nothing."""
    older = (LAUNCH, f"#define CUDA_ON_HOST_PTX 80\n{LAUNCH}")
    machine = ClusterMachine("cpu", {f"adapter_backward_cluster_{dtype}.cu": older for dtype in ("fp16", "bf16")})
    for dtype in HALVES:
        args = full_call(2, 9, 64, 16, dtype)
        machine.run(args, torch.ones_like(args.x), one_launch=False)


BROKEN = """
from test_adapter_cluster import LAUNCH, ClusterMachine, adapter, full_call, torch
names = {names!r}
lines = ["#include <atomic>", "#include <cooperative_groups.h>", '#include "adapter_launch.h"']
lines += [f"#define {{name}} num_blocks" for name in names]
adapter.ONE_LAUNCH = True
machine = ClusterMachine("cpu", {{"adapter_backward_cluster_fp16.cu": (LAUNCH, "\\n".join([*lines, LAUNCH]))}})
machine.check(full_call(1, 70, 200, 20, torch.float16, expert=torch.tensor(2)))
"""
"""A call with functions of the cluster replaced by one that has no effect."""


@needs_compiler
@pytest.mark.parametrize(
    ("names", "complaint"),
    [(("barrier_arrive", "barrier_wait"), "AssertionError: "), (("sync",), "was written after its end")],
    ids=["products", "units"],
)
def test_a_barrier_less_is_found(names: tuple[str, ...], complaint: str) -> None:
    """A test of these tests, in a process of its own, which some of what is found ends."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers"), str(Path(__file__).parent)])
    command = [sys.executable, "-c", BROKEN.format(names=names)]
    answer = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert answer.returncode != 0
    assert complaint in answer.stderr, answer.stderr[-4000:]


@needs_compiler
def test_no_access_out_of_bounds() -> None:
    """Odd sizes; what test_kernels_are_watched of test_adapter.py runs."""
    machine = ClusterMachine("cpu", TWO_RANKS if WATCH in os.environ else None)
    machine.check(full_call(3, 23, 100, 33, torch.float16, expert=torch.tensor([0, -1, 2])))
    machine.check(full_call(1, 67, 136, 64, torch.float16, expert=torch.tensor(1), dropout_p=0.3))
    args = full_call(1, 9, 132, 20, torch.bfloat16, norm_weight=None, norm_bias=None, residual=None)
    x = torch.randn(8 * 136 + 132).to(torch.bfloat16).as_strided((1, 9, 132), (1, 136, 1))  # ends with its last row
    machine.run(args._replace(x=x.requires_grad_()), torch.ones(1, 9, 132).bfloat16())
