"""Random adapter calls: every option of the operator, for Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.backends.arguments import MERGED, AdapterArguments


@st.composite
def adapter_calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    max_width: int = 70,
    max_bottleneck: int = 20,
    max_tokens: int = 40,
    min_bottleneck: int = 1,
) -> AdapterArguments:
    """A call with random shapes, options and values. Every differentiable tensor requires grad."""
    dtype = draw(st.sampled_from(dtypes))
    parameter_dtype = draw(st.sampled_from((dtype, torch.float32))) if dtype != torch.float64 else dtype
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    d, r = draw(st.integers(1, max_width)), draw(st.integers(min_bottleneck, max_bottleneck))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, max(1, max_tokens // 4)))
    num_experts = draw(st.integers(1, 5))
    flags = {
        name: draw(st.booleans())
        for name in ("norm", "norm_bias", "b_down", "b_up", "row_bias", "residual", "add_input", "scale", "dropout")
    }
    sparse = draw(st.sampled_from(("none", "up", "down", "both")))
    groups = draw(st.sampled_from(("id", "tensor", "sample", "merged", "one")))

    def normal(*shape: int, of: torch.dtype = parameter_dtype, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(shape, generator=generator)).to(of).requires_grad_()

    def owners(*shape: int) -> Tensor:
        return torch.randint(num_experts, shape, generator=generator, dtype=torch.uint8)

    expert: Tensor | None = None
    if groups in ("tensor", "sample", "one"):
        shape = {"tensor": (), "sample": (batch,), "one": (1,)}[groups]
        expert = torch.randint(MERGED, num_experts, shape, generator=generator)
    seed_shape = draw(st.sampled_from(((), (batch,))))
    seed = torch.randint(2**63 - 1, seed_shape, generator=generator) if draw(st.booleans()) else None
    x = normal(batch, length, d, of=dtype)
    w_down = normal(r, d, gain=d**-0.5)
    return AdapterArguments(
        x=x,
        residual=normal(batch, length, d, of=dtype) if flags["residual"] else None,
        w_down=w_down,
        b_down=normal(r) if flags["b_down"] else None,
        w_up=normal(d, r, gain=r**-0.5),
        b_up=(normal(num_experts, d) if flags["row_bias"] else normal(d)) if flags["b_up"] else None,
        assignment=owners(d, r) if sparse in ("up", "both") else None,
        assignment_down=owners(r, d) if sparse in ("down", "both") else None,
        w_down_init=normal(r, d, gain=d**-0.5).detach() if sparse in ("down", "both") else None,
        expert=expert,
        norm_weight=normal(d) if flags["norm"] else None,
        norm_bias=normal(d) if flags["norm"] and flags["norm_bias"] else None,
        scale_tensor=normal() if flags["scale"] else None,
        seed=seed,
        activity=torch.zeros(num_experts, requires_grad=True) if draw(st.booleans()) else None,
        expert_id=draw(st.integers(0, num_experts - 1)) if groups == "id" else MERGED,
        seed_id=draw(st.integers(0, 2**62)),
        norm_eps=draw(st.sampled_from((1e-6, 1e-5))),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        scale=draw(st.sampled_from((1.0, 0.1, -2.0))) if not flags["scale"] else 1.0,
        add_input=flags["add_input"],
        expert_scale=draw(st.sampled_from((1.0, float(num_experts)))),
        merged_scale=draw(st.sampled_from((1.0, 1 / num_experts))),
        dropout_p=draw(st.sampled_from((0.1, 0.5))) if flags["dropout"] else 0.0,
    )
