"""Low-rank updates of a frozen linear layer as a mixture of sparse experts: MoSL (arXiv 2312.02923, section 4.3).

LoRA is arXiv 2106.09685; with one expert this is it, and with one pruned expert it is SparseLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.backends import merge as definition
from mosa_kernels.backends.element_types import PLAIN
from mosa_kernels.functional.checks import has_no_values
from mosa_kernels.nn.adapter import FusedMoSAAdapter
from mosa_kernels.nn.options import check_count


class FusedMoSALoRA(FusedMoSAAdapter):
    """``scale * up(down(x))``, to be added to what a frozen linear layer makes of the same x.

    It is an adapter without norm, activation and biases, so that it folds into the frozen weight: see `delta`. Drawing
    of experts, evaluation and initialisation are those of `FusedMoSAAdapter`; a fresh layer adds nothing.

    Args:
        in_features: width of x, as of the frozen layer.
        out_features: width of the output, as of the frozen layer; None: the same.
        bottleneck: the rank r.
        num_experts: N; 1 is plain LoRA.
        scale: factor on the output (LoRA's alpha / r).
        dropout: probability of dropping an entry of the bottleneck in training.
        sparse, granularity, seed, merge_rule, expert_per, expert_scale, learnable_scale, pruned: see
            `FusedMoSAAdapter`.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range; the message names it, what was expected
            and what came.
    """

    _kept: tuple[Tensor, int, list[Tensor]] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        bottleneck: int = 16,
        num_experts: int = 4,
        scale: float = 1.0,
        dropout: float = 0.0,
        sparse: str = "up",
        granularity: str = "element",
        seed: int = 0,
        *,
        merge_rule: str = "mean",
        expert_per: str = "sample",
        expert_scale: float | str = 1.0,
        learnable_scale: bool = False,
        pruned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size is not None:
                check_count(name, size)
        super().__init__(
            in_features,
            bottleneck,
            num_experts,
            "identity",
            scale,
            False,
            dropout,
            sparse,
            granularity,
            False,
            seed,
            merge_rule=merge_rule,
            expert_per=expert_per,
            expert_scale=expert_scale,
            learnable_scale=learnable_scale,
            pruned=pruned,
            out_dim=out_features,
            bias=False,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        expert: Tensor | int | None = None,
        add_input: bool = False,
        samples: int | None = None,
    ) -> Tensor:
        """``[x] + [residual] + scale * up(down(x))``.

        Args:
            x: tokens [B, ..., in_features].
            residual: what the frozen layer made of x, [B, ..., out_features], or None. Where both widths are the same
                it is added in the kernel.
            expert: overrules what the layer would draw: an id, or ids [] or [G] (see `mosa_adapter`).
            add_input: whether x itself is a summand; needs equal widths.
            samples: how many images the first dimension holds, one after the other, where that is not B: windowed
                attention has B = images * windows, and an expert is drawn for each image.

        Returns:
            Tensor [B, ..., out_features] of x's dtype.

        Raises:
            TypeError: x is no tensor, or `samples` no whole number.
            ValueError: `samples` does not divide B, `residual` has another shape, or `add_input` with different widths.
        """
        draw = self._draw(x, expert, samples)
        if self.out_dim == self.dim:
            return self._run(x, draw, self.up.weight, None, self.up.assignment, residual, add_input)
        if add_input:
            raise ValueError(f"add_input: expected False for widths {self.dim} and {self.out_dim}, got True")
        if residual is not None and residual.shape != (*x.shape[:-1], self.out_dim):
            raise ValueError(
                f"residual: expected shape {[*x.shape[:-1], self.out_dim]} for x {list(x.shape)}, "
                f"got {list(residual.shape)}"
            )
        # The operator is square: the output comes in pieces as wide as the input, the last one filled with zeros.
        weights, owners = self._squares(self.up.weight), self._owners()
        pieces = [
            self._run(x, draw, weight, None, owner, None, False) for weight, owner in zip(weights, owners, strict=True)
        ]
        out = (pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1))[..., : self.out_dim]
        return out if residual is None else residual + out

    def _squares(self, matrix: Tensor) -> list[Tensor]:
        """The rows of [out, n], `dim` at a time."""
        missing = -self.out_dim % self.dim
        return list(F.pad(matrix, (0, 0, 0, missing)).split(self.dim))

    def _owners(self) -> Sequence[Tensor | None]:
        """The owners of each piece. They are the same tensors from call to call, as long as the assignment stays as it
        is: backends read tables off them once, and wait for the GPU to do so."""
        owner = self.up.assignment
        if owner is None:
            return [None] * -(-self.out_dim // self.dim)
        passing = has_no_values() or type(owner) not in PLAIN or owner.is_inference()
        if passing or (owner.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._squares(owner)
        if self._kept is None or self._kept[0] is not owner or self._kept[1] != owner._version:
            self._kept = owner, owner._version, self._squares(owner)
        return self._kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @torch.no_grad()
    def delta(self, rule: str | None = None, expert: int | None = None) -> Tensor:
        """What merging adds to the frozen weight (Eq. 7 and 8), float32 [out_features, in_features].

        float64 for a layer in float64. Sums and products are in that dtype whatever the layer's own.

        Args:
            rule: "mean" or "jigsaw"; None is the layer's `merge_rule`, which evaluation mode computes too.
            expert: only this one, as it runs by itself, in place of all by a rule.

        Raises:
            TypeError: `expert` is no whole number.
            ValueError: `rule` is neither, or there is no such expert.
        """
        given = self.merge_input(rule, expert)
        working = torch.promote_types(given.w_down.dtype, torch.float32)
        (merged,) = definition.merge([given], fold_norm=False, dtype=working)  # of any widths, as no kernel merges
        with torch.autocast(merged.w_down.device.type, enabled=False):
            return merged.w_up @ merged.w_down

    @torch.no_grad()
    def merge(  # type: ignore[override]  # no dense adapter is left
        self, rule: str | None = None, *, expert: int | None = None
    ) -> nn.Linear:
        """`delta` as a plain linear layer without a bias, in the layer's dtype, for those who do not fold it.

        Raises:
            TypeError: `expert` is no whole number.
            ValueError: `rule` is neither "mean" nor "jigsaw", or there is no such expert.
        """
        linear = nn.Linear(self.dim, self.out_dim, bias=False, device="meta")
        linear.weight = nn.Parameter(self.delta(rule, expert).to(self.up.weight.dtype))
        return linear.train(self.training)
