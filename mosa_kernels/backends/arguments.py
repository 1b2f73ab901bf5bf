"""What one adapter call consists of, as every backend receives it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

MERGED = -1
"""The expert id of tokens that see the merged adapter."""


class AdapterArguments(NamedTuple):
    """One adapter call: ``out = [x] + [residual] + scale * y`` (arXiv 2312.02923, Eq. 1, 2 and 5).

    The order of the fields is the order of the arguments of the ``adapter_forward`` operator. Weights are as
    `torch.nn.Linear` keeps them. With ``expert`` given, its ``G`` entries belong to ``G`` equal runs of consecutive
    tokens; without it ``expert_id`` holds for all tokens. The same goes for ``seed`` and ``seed_id``.

    What `torch.compile` traces reads fields alone: PyTorch 2.9 does not see the properties of a named tuple.
    """

    x: Tensor  # [..., d]
    residual: Tensor | None  # like x; under autocast its dtype may be narrower
    w_down: Tensor  # [r, d]
    b_down: Tensor | None  # [r]
    w_up: Tensor  # [d, r]
    b_up: Tensor | None  # [N, d] one per expert, or [d] shared
    assignment: Tensor | None  # uint8 [d, r], the owner of each entry of w_up; None: dense
    assignment_down: Tensor | None  # uint8 [r, d], the owner of each entry of w_down; None: dense
    w_down_init: Tensor | None  # [r, d], what an expert sees outside its own entries of w_down
    expert: Tensor | None  # integer [] or [G]
    norm_weight: Tensor | None  # [d]; None: no LayerNorm
    norm_bias: Tensor | None  # [d]
    scale_tensor: Tensor | None  # [], a learnable scale, in place of `scale`
    seed: Tensor | None  # int64 [] or [G]
    activity: Tensor | None  # float32 [N], receives as its gradient which experts ran
    expert_id: int = MERGED
    seed_id: int = 0
    norm_eps: float = 1e-6
    activation: str = "gelu"
    scale: float = 1.0
    add_input: bool = True
    expert_scale: float = 1.0
    merged_scale: float = 1.0
    dropout_p: float = 0.0
    compute_dtype: torch.dtype | None = None  # dtype of the matrix products; None: that of x

    @property
    def width(self) -> int:
        return self.x.shape[-1]

    @property
    def bottleneck(self) -> int:
        return self.w_down.shape[0]

    @property
    def has_experts(self) -> bool:
        """Whether any tensor differs from expert to expert."""
        return (
            self.assignment is not None
            or self.assignment_down is not None
            or (self.b_up is not None and self.b_up.dim() == 2)
        )

    @property
    def matmul_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.x.dtype


TENSORS = AdapterArguments._fields.index("expert_id")  # the tensors come first, then the options


def has_gradients(args: AdapterArguments) -> bool:
    """Whether any tensor of a call requires a gradient."""
    tensors: Any = args[:TENSORS]
    return args.w_down.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in tensors)


class AdapterNeeds(NamedTuple):
    """Which gradients a backward pass has to produce."""

    x: bool
    w_down: bool
    b_down: bool
    w_up: bool
    b_up: bool
    norm_weight: bool
    norm_bias: bool
    scale: bool
    activity: bool


class AdapterGradients(NamedTuple):
    """The gradients of one adapter call, each with the shape and dtype of its argument, or None.

    The gradient of the residual is that of the output and is not listed.
    """

    x: Tensor | None = None
    w_down: Tensor | None = None
    b_down: Tensor | None = None
    w_up: Tensor | None = None  # exactly zero outside the entries of the experts that ran
    b_up: Tensor | None = None  # exactly zero in the rows of experts that did not run
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    scale: Tensor | None = None
    activity: Tensor | None = None


def expert_activity(args: AdapterArguments) -> Tensor:
    """1 for each expert that ran, 0 for the others, float32 [N]. A merged token runs them all."""
    assert args.activity is not None
    return experts_that_ran(args.expert, args.expert_id, args.activity)


def experts_that_ran(expert: Tensor | None, expert_id: int, activity: Tensor) -> Tensor:
    """The same of ids, or of the number in their place."""
    experts = activity.shape[0]
    if activity.device.type == "cpu":
        # One small tensor made on the host; the device's way below takes several operations.
        ids = {expert_id} if expert is None else set(expert.reshape(-1).tolist())
        ran = [float(MERGED in ids or each in ids) for each in range(experts)]
        return torch.tensor(ran, dtype=torch.float32, device="cpu")
    # The last slot is the merged adapter's: index -1.
    slots = torch.zeros(experts + 1, dtype=torch.float32, device=activity.device)
    if expert is None:
        slots[expert_id].fill_(1)
    else:
        slots.index_fill_(0, expert.reshape(-1).long() % (experts + 1), 1)
    return torch.maximum(slots[:-1], slots[-1])
