"""The operators beside the adapter, compiled for GPUs that need not be there, in every variant that can occur."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mosa_kernels.backends.consistency import ConsistencyArguments
from mosa_kernels.backends.masked_adamw import AdamWOptions, AdamWTensors
from mosa_kernels.backends.merge import MergeInput

pytest.importorskip("triton", reason="PyTorch came without Triton")
from triton_aot import SMALL_SHARED, machine_code

from mosa_kernels.backends.triton import alignment, consistency, masked_adamw, merge
from mosa_kernels.backends.triton.launch import Launch, interpreted

pytestmark = pytest.mark.skipif(
    interpreted(masked_adamw.masked_adamw_kernel), reason="the interpreter compiles nothing"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHS = (80, 90)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would have been launched, on CPU tensors."""
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda self: launches.append(self))
    return launches


def assert_fits(launch: Launch, arch: int, scratch: Path, blocks: int) -> str:
    """No spills, and enough registers for some blocks on a multiprocessor."""
    code = machine_code(launch, arch, scratch)
    assert code.spilled == 0
    assert code.shared <= SMALL_SHARED // blocks
    assert code.registers * launch.num_warps * 32 * blocks <= 65536
    return code.ptx


def wide_accesses(ptx: str) -> tuple[int, int]:
    """Loads and stores of 16 bytes."""
    return tuple(len(re.findall(rf"{kind}\.global\S*\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx)) for kind in ("ld", "st"))  # type: ignore[return-value]


def parameters(dtypes: tuple[torch.dtype, ...], experts: int = 4) -> AdamWTensors:
    """One parameter of each dtype, split by entry."""

    def column(*shape: int) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype) for dtype in dtypes]

    count = len(dtypes)
    return AdamWTensors(
        *(column(64, 64) for _ in range(4)),
        [torch.zeros(experts) for _ in range(count)],
        [torch.zeros(64, 64, dtype=torch.uint8) for _ in range(count)],
        [torch.ones(experts) for _ in range(count)],
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_optimizer(dtypes: tuple[torch.dtype, ...], lr: float | Tensor, arch: int, tmp_path: Path) -> None:
    launch = masked_adamw.step_launch(parameters(dtypes), AdamWOptions(lr, 0.9, 0.999, 1e-8, 0.01))
    ptx = assert_fits(launch, arch, tmp_path, blocks=4)
    assert len(re.findall(r"\batom\.", ptx)) == 1, "one ticket a program"


def test_optimizer_moves_29_bytes_a_parameter(tmp_path: Path) -> None:
    """Read: parameter, gradient, moments and owners; written: parameter and moments. Four float32 entries a thread."""
    launch = masked_adamw.step_launch(parameters((torch.float32,)), AdamWOptions(0.1, 0.9, 0.999, 1e-8, 0.01))
    entries = masked_adamw.BLOCK // (32 * masked_adamw.NUM_WARPS)
    assert entries == 4
    loads, stores = wide_accesses(machine_code(launch, 90, tmp_path).ptx)
    owners = entries  # bytes
    assert (16 * loads + 16 * stores + owners) / entries == 29


@pytest.mark.parametrize("arch", ARCHS)
def test_optimizer_of_many_experts_at_odd_addresses(arch: int, tmp_path: Path) -> None:
    tensors = parameters(DTYPES, experts=256)
    tensors.params[0] = torch.zeros(64 * 64 + 1)[1:].view(64, 64)
    launch = masked_adamw.step_launch(tensors, AdamWOptions(0.1, 0.9, 0.999, 1e-8, 0.01))
    assert_fits(launch, arch, tmp_path, blocks=2)


@pytest.mark.parametrize("arch", ARCHS)
def test_merge(arch: int, tmp_path: Path, launched: list[Launch]) -> None:
    merge.merge([MergeInput(torch.zeros(8, 16), None, torch.zeros(16, 8), torch.zeros(4, 16))], True, None)
    (launch,) = launched
    assert_fits(launch, arch, tmp_path, blocks=4)


def features(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    dtypes = DTYPES if kind == "all" else [getattr(torch, kind.split()[0])]
    both = [torch.zeros(4, 8, 64, dtype=dtype) for dtype in dtypes]
    if "rows" in kind:
        both = [b[..., :32] for b in both]
    return [b[:2] for b in both], [b[2:] for b in both]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "all", "float32 in rows"])
def test_alignment(kind: str, arch: int, tmp_path: Path, launched: list[Launch]) -> None:
    pair = features(kind)
    alignment.feature_alignment(*pair)
    grads = [[torch.empty(f.shape, dtype=f.dtype) for f in half] for half in pair]
    alignment.feature_alignment_backward(torch.ones(()), *pair, *grads)
    forward, backward = (assert_fits(launch, arch, tmp_path, blocks=3 if "rows" in kind else 4) for launch in launched)
    if kind in ("float16", "bfloat16"):  # eight entries a thread
        assert wide_accesses(forward)[0] >= 2
        assert wide_accesses(backward) == (2, 2)
    if kind == "float32":
        assert wide_accesses(backward) == (4, 4)


def calls() -> Iterator[ConsistencyArguments]:
    for dtype, target, detach in product(DTYPES, ("classes", "probabilities"), (False, True)):
        logits = [torch.zeros(4, 1000, dtype=dtype) for _ in range(2)]
        soft = torch.zeros(4, 1000) if target == "probabilities" else torch.zeros(4, dtype=torch.int64)
        yield ConsistencyArguments(*logits, soft, 0.1, detach)


@pytest.mark.parametrize(
    "args", [*calls()], ids=lambda args: f"{args.logits1.dtype}-{args.target.dtype}-{args.detach_targets}"
)
def test_consistency(args: ConsistencyArguments, tmp_path: Path, launched: list[Launch]) -> None:
    *_, saved = consistency.consistency_forward(args)
    grads: Any = tuple(torch.empty(t.shape, dtype=t.dtype) for t in args[:2])
    consistency.consistency_backward(args, saved, torch.ones(()), torch.ones(()), grads)
    for launch, arch in product(launched, ARCHS):
        assert_fits(launch, arch, tmp_path, blocks=4)
