"""The adapter in float64, written group by group from its definition and independent of the code under test."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mosa_kernels.backends.arguments import AdapterArguments


def oracle_adapter(args: AdapterArguments) -> Tensor:
    """Output of an adapter call, float64, differentiable in whatever float64 leaves the arguments hold."""
    x = args.x
    d, r = x.shape[-1], args.w_down.shape[0]
    tokens = x.reshape(-1, d)
    experts = _per_token(args.expert, args.expert_id, tokens.shape[0])
    u = tokens
    if args.norm_weight is not None:
        centred = tokens - tokens.mean(1, keepdim=True)
        u = centred / (centred.square().mean(1, keepdim=True) + args.norm_eps).sqrt() * args.norm_weight
        if args.norm_bias is not None:
            u = u + args.norm_bias
    scale = args.scale if args.scale_tensor is None else args.scale_tensor

    keep = torch.ones(tokens.shape[0], r, dtype=torch.bool)
    if args.dropout_p > 0:
        keep = _keep(args, tokens.shape[0], r)

    y = torch.zeros_like(tokens)
    for e in sorted(set(experts.tolist())):
        rows = experts == e
        w_down = _seen_by(e, args.w_down, args.assignment_down, args.w_down_init, args)
        w_up = _seen_by(e, args.w_up, args.assignment, None, args)
        z = u[rows] @ w_down.T
        if args.b_down is not None:
            z = z + args.b_down
        a = _activation(args.activation, z) * keep[rows] / (1 - args.dropout_p)
        up = a @ w_up.T
        if args.b_up is not None:
            b = args.b_up
            up = up + (b if b.dim() == 1 else b.sum(0) / b.shape[0] if e < 0 else b[e])
        y = y.index_put((rows.nonzero().squeeze(1),), up)
    out = scale * y
    if args.add_input:
        out = out + tokens
    out = out.view(x.shape)
    return out if args.residual is None else out + args.residual


def double(args: AdapterArguments) -> AdapterArguments:
    """The same call on float64 leaves that require grad."""
    grads = {"x", "residual", "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "scale_tensor"}
    values = {
        name: getattr(args, name).detach().double().requires_grad_()
        for name in grads
        if getattr(args, name) is not None
    }
    if args.w_down_init is not None:
        values["w_down_init"] = args.w_down_init.double()
    return args._replace(**values, compute_dtype=None)


def _seen_by(e: int, w: Tensor, owner: Tensor | None, initial: Tensor | None, args: AdapterArguments) -> Tensor:
    if owner is None:
        return w
    rest = torch.zeros_like(w) if initial is None else initial
    factor = torch.full_like(w, args.merged_scale) if e < 0 else args.expert_scale * (owner.long() == e).double()
    return rest + factor * (w - rest)


def _activation(name: str, z: Tensor) -> Tensor:
    if name == "gelu":
        return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "relu":
        return z * (z > 0)
    if name == "silu":
        return z / (1 + torch.exp(-z))
    assert name == "identity"
    return z


def _per_token(ids: Tensor | None, single: int, tokens: int) -> Tensor:
    if ids is None:
        return torch.full((tokens,), single)
    ids = ids.reshape(-1).long()
    return ids.repeat_interleave(tokens // ids.numel()) if tokens else ids[:0]


def _keep(args: AdapterArguments, tokens: int, r: int) -> Tensor:
    seeds = [args.seed_id] if args.seed is None else args.seed.reshape(-1).tolist()
    kept = [_keep_group(seed, tokens // len(seeds), r, args.dropout_p) for seed in seeds]
    return torch.from_numpy(np.concatenate(kept))


def _keep_group(seed: int, rows: int, r: int, p: float) -> np.ndarray:
    """Two rounds of a 32-bit hash over the index of the entry, in unsigned arithmetic."""

    def mix(h: np.ndarray) -> np.ndarray:
        h = h ^ (h >> np.uint32(16))
        h = h * np.uint32(0x21F0AAAD)
        h = h ^ (h >> np.uint32(15))
        h = h * np.uint32(0x735A2D97)
        return h ^ (h >> np.uint32(15))

    index = np.arange(rows * r, dtype=np.uint32)
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    with np.errstate(over="ignore"):
        bits = mix(mix(index + low) ^ high)
    return (bits.astype(np.uint64) >= int(p * 2**32)).reshape(rows, r)
