"""Plain calls (csrc/adapter_plain.h), whose kernels know what others ask for, against the oracle and those others."""

from __future__ import annotations

import pytest
import torch
from calls import full_call
from cuda_machine import Changes, Machine, check_only_experts_that_ran, needs_compiler, on_machines, tensors_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import MERGED, AdapterArguments

pytestmark = pytest.mark.filterwarnings("ignore:mosa_kernels, CUDA backend")

HALVES = (torch.float16, torch.bfloat16)
TYPES = [
    *((dtype, dtype, None) for dtype in (torch.float32, *HALVES)),
    *((dtype, torch.float32, None) for dtype in HALVES),
    *((torch.float32, torch.float32, dtype) for dtype in HALVES),
]
"""Of x, of the weights, and what autocast multiplies in: those that have kernels of their own."""
BATCH = 3


@st.composite
def plain_calls(draw: st.DrawFn) -> AdapterArguments:
    """A call with LayerNorm, a width of whole steps, whole vectors of units, and any option that is left."""
    dtype, parameter_dtype, compute_dtype = draw(st.sampled_from(TYPES))
    d, r = 64 * draw(st.integers(1, 3)), 8 * draw(st.sampled_from((1, 2, 3, 4, 5, 8, 9, 16)))
    options: dict[str, object] = {}
    for name in ("b_down", "b_up", "assignment", "residual"):
        if draw(st.integers(0, 3)) == 0:
            options[name] = None
    if compute_dtype is not None and "residual" not in options and draw(st.booleans()):
        narrow = torch.randn(BATCH, 1, d, generator=torch.Generator().manual_seed(3)).to(compute_dtype)
        options["residual"] = narrow  # an FFN's output beside a float32 stream
    ids = draw(st.sampled_from(("sample", "merged", "batch")))
    if ids == "sample":
        options["expert"] = torch.tensor(draw(st.lists(st.integers(MERGED, 3), min_size=BATCH, max_size=BATCH)))
    elif ids == "batch":
        options["expert_id"] = draw(st.integers(0, 3))
    if draw(st.booleans()):
        options |= {"dropout_p": 0.3, "seed_id": draw(st.integers(0, 2**40))}
    if (compute_dtype or dtype) == torch.float32 and draw(st.booleans()):
        # In half precision luck decides between two rounding errors of its gradient, a single number.
        options |= {"scale_tensor": torch.tensor(0.7, dtype=parameter_dtype, requires_grad=True), "scale": 1.0}
    length = draw(st.integers(3, 50))
    if isinstance(narrow := options.get("residual"), torch.Tensor):
        options["residual"] = narrow.repeat(1, length, 1).requires_grad_()
    return full_call(
        BATCH, length, d, r, dtype, parameter_dtype, values=draw(st.integers(0, 2**31)), compute_dtype=compute_dtype,
        activation=draw(st.sampled_from(sorted(set(ACTIVATIONS) - {"relu"}))), add_input=draw(st.booleans()),
        expert_scale=draw(st.sampled_from((1.0, 4.0))), merged_scale=draw(st.sampled_from((1.0, 0.25))), **options,
    )  # fmt: skip


@on_machines
@settings(max_examples=40, phases=[Phase.explicit, Phase.generate])
@given(args=plain_calls())
def test_any_plain_call(machine: Machine, args: AdapterArguments) -> None:
    machine.check(args)


@on_machines
@pytest.mark.parametrize(("dtype", "parameter_dtype", "compute_dtype"), TYPES)
@pytest.mark.parametrize("r", [24, 64, 128])
def test_experts_beside_the_merged_adapter(
    machine: Machine, dtype: torch.dtype, parameter_dtype: torch.dtype, compute_dtype: torch.dtype | None, r: int
) -> None:
    ids = (1, -1, 3, 1)
    for ran in (ids, ids[2:]):
        args = full_call(len(ran), 19, 128, r, dtype, parameter_dtype, expert=torch.tensor(ran), expert_scale=4.0)
        gradients = machine.check(args._replace(compute_dtype=compute_dtype, merged_scale=0.25))
        check_only_experts_that_ran(args, gradients, ran)


@needs_compiler
@pytest.mark.parametrize(("dtype", "parameter_dtype", "compute_dtype"), TYPES)
def test_the_same_bits_as_kernels_for_any_call(
    dtype: torch.dtype, parameter_dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> None:
    """Which a residual that does not begin at a multiple of 16 bytes leads to."""
    machine = Machine("cpu")
    for r in (8, 40, 96):
        args = full_call(
            2, 37, 128, r, dtype, parameter_dtype, compute_dtype=compute_dtype, expert=torch.tensor([2, -1]),
            dropout_p=0.2, seed_id=5,
        )  # fmt: skip
        assert args.residual is not None
        memory = torch.empty(args.x.numel() + 1, dtype=dtype)
        memory[1:] = args.residual.detach().flatten()
        elsewhere = args._replace(residual=memory[1:].view_as(args.x).requires_grad_())
        grad_out = torch.randn(args.x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        plain, general = (tensors_of(*machine.run(call, grad_out)) for call in (args, elsewhere))
        for found, wanted in zip(plain, general, strict=True):
            assert torch.equal(found, wanted)


def half_a_vector(direction: str) -> Changes:
    """Plain kernels of fp16 that look at half of each vector."""
    include = f'#include "adapter_{direction}_launch.h"'
    half = """#include "adapter_plain.h"
namespace mosa {
template <>
inline int columns_from(const PlainParams<__half, __half>&, int) {
  return kVector / 2;
}
}  // namespace mosa
"""
    return {f"adapter_{direction}_fp16.cu": (include, half + include)}


@needs_compiler
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_broken_plain_kernel_is_found(direction: str) -> None:
    """A test of these tests: it is the plain kernels that they run."""
    machine = Machine("cpu", half_a_vector(direction))
    machine.check(full_call(2, 37, 72, 16, torch.float16, expert=torch.tensor(2)))
    with pytest.raises(AssertionError, match="error"):
        machine.check(full_call(2, 37, 64, 16, torch.float16, expert=torch.tensor(2)))
