"""The naive definition against the float64 oracle, and its gradients against finite differences."""

from __future__ import annotations

import torch
from cases import adapter_calls
from hypothesis import given, settings
from oracle import double, oracle_adapter

from mosa_kernels.backends import reference
from mosa_kernels.backends.arguments import AdapterArguments
from mosa_kernels.backends.dropout import keep_mask


@given(adapter_calls())
def test_reference_is_the_definition(args: AdapterArguments) -> None:
    args = double(args)
    out, expected = reference.adapter(args), oracle_adapter(args)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    leaves = [leaf for leaf in args[:15] if leaf is not None and leaf.requires_grad and leaf is not args.activity]
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, weights, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, weights, allow_unused=True, materialize_grads=True)
    for grad, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, value, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(adapter_calls(max_width=5, max_bottleneck=4, max_tokens=8))
def test_reference_gradcheck(args: AdapterArguments) -> None:
    # Away from the kink of relu, which finite differences cannot cross.
    args = double(args)._replace(activity=None)
    if args.activation == "relu":
        args = args._replace(activation="silu")
    names = [name for name in args._fields[:14] if getattr(getattr(args, name), "requires_grad", False)]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return reference.adapter(args._replace(**dict(zip(names, leaves, strict=True))))

    # A LayerNorm over one or two equal columns divides by almost nothing; its differences are not finite ones.
    if args.norm_weight is not None and args.width < 3:
        args = args._replace(norm_eps=1.0)
    assert torch.autograd.gradcheck(call, [getattr(args, name) for name in names], atol=1e-5, rtol=1e-3)


def test_keep_mask_is_the_hash_of_the_oracle() -> None:
    import oracle

    for seed in (0, 1, 2**31, 2**32 + 5, 2**62 + 12345):
        kept = keep_mask(seed, 37, 19, 0.3, torch.device("cpu"))
        assert torch.equal(kept, torch.from_numpy(oracle._keep_group(seed, 37, 19, 0.3)))


def test_keep_mask_rates_and_independence() -> None:
    device = torch.device("cpu")
    for p in (0.1, 0.5, 0.9):
        kept = keep_mask(123456789, 4000, 64, p, device).double()
        assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        assert (kept.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 4000) ** 0.5
        neighbours = (kept[1:] * kept[:-1]).mean().item()
        assert abs(neighbours - (1 - p) ** 2) < 0.01
    first, second = keep_mask(1, 4000, 64, 0.5, device), keep_mask(2, 4000, 64, 0.5, device)
    assert abs((first == second).double().mean().item() - 0.5) < 0.01
    halves = keep_mask(torch.tensor([1, 2]), 8000, 64, 0.5, device)
    assert torch.equal(halves, torch.cat([first, second]))
