"""The drop-in layer: a mixture of sparse adapters in one dense copy (arXiv 2312.02923, sections 3.2 to 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.functional.adapter import mosa_adapter
from mosa_kernels.functional.checks import check_expert_ids
from mosa_kernels.functional.merge import MergedWeights, MergeInput, merge_adapters
from mosa_kernels.functional.split import split
from mosa_kernels.nn.activity import ExpertActivity
from mosa_kernels.nn.dense import DenseAdapter
from mosa_kernels.nn.options import (
    check_choice,
    check_count,
    check_expert,
    check_expert_scale,
    check_flag,
    check_not_negative,
    check_number,
    check_placement,
    check_probability,
    check_seed,
    check_whole,
)
from mosa_kernels.nn.projection import Projection
from mosa_kernels.nn.sampler import Draw, ExpertSampler

SPARSE = ("up", "down", "both")
MERGE_RULES = ("mean", "jigsaw")


class FusedMoSAAdapter(nn.Module):
    """An adapter split into N sparse experts; one runs at each forward pass, all are one matrix at inference.

    A fresh layer adds nothing: its up-projection is zero. In training mode an expert is drawn at random for each
    sample or batch; in evaluation mode the layer computes the merged adapter by `merge_rule`, without a copy of the
    weight, so `merge` changes nothing.

    Args:
        dim: width d of the tokens.
        bottleneck: r.
        num_experts: N; 1 is the plain dense adapter (AdaptFormer).
        activation: "gelu", "gelu_tanh", "relu", "silu" or "identity".
        scale: factor on the adapter's output.
        norm: whether tokens pass a LayerNorm of the adapter's own first.
        dropout: probability of dropping an entry of the bottleneck in training.
        sparse: which projection is split: "up" (the paper's hierarchical strategy), "down" or "both".
        granularity: see `split`.
        expert_bias: one up-projection bias per expert, or one that all share.
        seed: of the split.
        merge_rule: "mean", the expectation of a drawn expert, or "jigsaw" (Eq. 7).
        expert_per: draw an expert per "sample" or per "batch" (the paper).
        expert_scale: factor on the running expert's entries; "N" makes both merge rules the same.
        learnable_scale: whether `scale` is a parameter, of shape [1].
        pruned: only expert 0 ever runs and the rest is pruned: SparseAdapter, with 1/N of a dense adapter.
        norm_eps: epsilon of the LayerNorm.
        out_dim: width of the up-projection's output, for subclasses that put it elsewhere; None: d.
        bias: whether the projections have biases; `expert_bias` says of what kind.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range; the message names it, what was expected
            and what came.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int = 64,
        num_experts: int = 4,
        activation: str = "gelu",
        scale: float = 0.1,
        norm: bool = True,
        dropout: float = 0.0,
        sparse: str = "up",
        granularity: str = "element",
        expert_bias: bool = True,
        seed: int = 0,
        *,
        merge_rule: str = "mean",
        expert_per: str = "sample",
        expert_scale: float | str = 1.0,
        learnable_scale: bool = False,
        pruned: bool = False,
        norm_eps: float = 1e-6,
        out_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        sizes = (("dim", dim), ("bottleneck", bottleneck), ("num_experts", num_experts), ("out_dim", out_dim))
        for name, size in sizes:
            check_count(name, size)
        check_seed("seed", seed)
        flags = (
            ("norm", norm),
            ("expert_bias", expert_bias),
            ("learnable_scale", learnable_scale),
            ("pruned", pruned),
            ("bias", bias),
        )
        for name, flag in flags:
            check_flag(name, flag)
        check_choice("sparse", sparse, SPARSE)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_choice("merge_rule", merge_rule, MERGE_RULES)
        check_probability("dropout", dropout)
        check_number("scale", scale)
        check_not_negative("norm_eps", norm_eps)
        check_expert_scale(expert_scale)
        check_placement(device, dtype)
        self.dim, self.out_dim, self.bottleneck, self.num_experts = dim, out_dim, bottleneck, num_experts
        self.activation, self.dropout, self.sparse, self.granularity = activation, dropout, sparse, granularity
        self.merge_rule, self.pruned = merge_rule, pruned
        self.expert_scale = float(num_experts) if isinstance(expert_scale, str) else expert_scale
        if pruned:
            self.expert_scale = 1.0  # the one expert that runs is the adapter; there is nothing to make up for

        self.seed, self._fresh_scale = seed, scale
        owners = self._fresh_owners()
        bias_rows = num_experts if expert_bias and num_experts > 1 and not pruned else None
        self.norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype) if norm else None
        self._activity = ExpertActivity(num_experts) if num_experts > 1 else None
        self.down = Projection(
            dim,
            bottleneck,
            owners.get("down"),
            initial="down" in owners,
            has_bias=bias,
            activity=self._activity,
            device=device,
            dtype=dtype,
        )
        self.up = Projection(
            bottleneck,
            out_dim,
            owners.get("up"),
            bias_rows=bias_rows,
            has_bias=bias,
            activity=self._activity,
            device=device,
            dtype=dtype,
        )
        self.scale: float | nn.Parameter = scale
        if learnable_scale:
            # [1], since FSDP2 shards no scalars
            self.scale = nn.Parameter(torch.tensor([scale], device=device, dtype=dtype or torch.get_default_dtype()))
        self.sampler = ExpertSampler(num_experts, expert_per, fixed=0 if pruned and num_experts > 1 else None)
        self.backend: str | None = None
        self._reset_weights()

    def _fresh_owners(self) -> dict[str, Tensor]:
        """The split of the seed, of those projections that are split."""
        if self.num_experts == 1:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {"up": (self.out_dim, self.bottleneck), "down": (self.bottleneck, self.dim)}
        return {
            side: split(shape, self.num_experts, self.granularity, generator)
            for side, shape in shapes.items()
            if self.pruned or self.sparse in (side, "both")
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kaiming-uniform down, zero up, zero biases: the layer adds nothing at the start.

        The split is the seed's again, and a learnable `scale` what it began with: nothing stays of what the memory held
        before, as after `torch.nn.Module.to_empty`.
        """
        for side, owners in self._fresh_owners().items():
            self.get_submodule(side).get_buffer("assignment").copy_(owners)
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(self._fresh_scale)
        self._reset_weights()

    def _reset_weights(self) -> None:
        if self.norm is not None:
            self.norm.reset_parameters()
        self.down.reset_kaiming()
        if self.pruned and self.down.initial is not None:
            self.down.initial.zero_()
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    @property
    def merged_scale(self) -> float:
        """The factor that turns the one dense copy into the merged adapter, by `merge_rule`."""
        return self._merged_scale(self.merge_rule)

    def _merged_scale(self, rule: str) -> float:
        return self.expert_scale / self.num_experts if rule == "mean" else 1.0

    def forward(
        self, x: Tensor, residual: Tensor | None = None, expert: Tensor | int | None = None, add_input: bool = True
    ) -> Tensor:
        """``[x] + [residual] + scale * adapter(x)``.

        Args:
            x: tokens [B, ..., d].
            residual: a second summand, shaped like x, or None.
            expert: overrules what the layer would draw: an id, or ids [] or [G] (see `mosa_adapter`).
            add_input: whether x itself is a summand.

        Returns:
            Tensor with the shape and dtype of x.

        Raises:
            TypeError, ValueError: see `mosa_adapter`.
        """
        draw = self._draw(x, expert)
        return self._run(x, draw, self.up.weight, self.up.bias, self.up.assignment, residual, add_input)

    def _draw(self, x: Tensor, expert: Tensor | int | None, samples: int | None = None) -> Draw:
        """What this pass over `samples` images (None: x.shape[0]) has drawn, or has been told."""
        if expert is not None:
            if not isinstance(expert, Tensor):
                check_whole("expert", expert, "a number or an integer tensor")
            check_expert_ids(expert, self.sampler.num_experts)
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.dim() == 0:
            raise ValueError(f"x: expected [B, ..., {self.dim}], got []")
        if samples is None:
            samples = x.shape[0]
        elif not hasattr(samples, "__index__"):
            raise TypeError(f"samples: expected a whole number or None, got {samples!r}")
        elif samples != x.shape[0] and (samples < 1 or x.shape[0] % samples):
            raise ValueError(f"samples: expected a divisor of x.shape[0] = {x.shape[0]}, got {samples}")
        draw = self.sampler(samples, x.device, self.training and self.dropout > 0)
        if x.shape[0] == 0:
            return Draw(self.sampler.fixed, draw.seed)
        if expert is not None:
            return Draw(expert, draw.seed)
        if x.dim() == 1 and isinstance(draw.expert, Tensor) and draw.expert.dim() == 1:
            raise ValueError(
                f"x: expected [B, ..., {self.dim}], for an expert is drawn for each of B samples, got {list(x.shape)}"
            )
        return draw

    def _run(
        self,
        x: Tensor,
        draw: Draw,
        w_up: Tensor,
        b_up: Tensor | None,
        assignment: Tensor | None,
        residual: Tensor | None,
        add_input: bool,
    ) -> Tensor:
        activity = self.activity if self.training else None
        empty = x.shape[0] == 0
        out = mosa_adapter(
            x,
            self.down.weight,
            self.down.bias,
            w_up,
            b_up,
            assignment,
            draw.expert,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_bias=None if self.norm is None else self.norm.bias,
            norm_eps=1e-6 if self.norm is None else self.norm.eps,
            activation=self.activation,
            scale=self._factor(),
            residual=residual,
            add_input=add_input,
            dropout_p=self.dropout if self.training else 0.0,
            seed=draw.seed,
            assignment_down=self.down.assignment,
            w_down_init=self.down.initial,
            expert_scale=self.expert_scale,
            merged_scale=self.merged_scale,
            activity=None if empty else activity,
            backend=self.backend,
        )
        if empty and activity is not None:
            out = out + activity.sum().to(out.dtype)  # reports that no expert ran: the gradient is a sum of nothing
        return out

    def _factor(self) -> float | Tensor:
        """The scale as operators take it."""
        return self.scale.squeeze() if isinstance(self.scale, nn.Parameter) else self.scale

    @property
    def activity(self) -> Tensor | None:
        """The leaf of `track_activity`, or None."""
        return None if self._activity is None else self._activity.leaf

    def track_activity(self) -> Tensor | None:
        """Has each backward pass report which experts ran, and returns the leaf that receives it as its gradient.

        float32 [N]; None for an adapter without experts. `MoSAAdamW` does the same.
        """
        return None if self._activity is None else self._activity.track(self.up.weight.device)

    def merge_input(self, rule: str | None = None, expert: int | None = None) -> MergeInput:
        """What the merge kernel needs of this layer, for several layers to be merged in one launch.

        Raises:
            TypeError: `expert` is no whole number.
            ValueError: `rule` is neither "mean" nor "jigsaw", or there is no such expert.
        """
        rule = self.merge_rule if rule is None else rule
        check_choice("rule", rule, MERGE_RULES)
        if expert is not None:
            check_expert("expert", expert, self.sampler.choices)
        w_down: Tensor = self.down.weight
        w_up: Tensor = self.up.weight
        b_up: Tensor | None = self.up.bias
        initial, factor = self.down.initial, self._merged_scale(rule)
        alone = expert if self.sampler.fixed is None else self.sampler.fixed
        if alone is not None and self.num_experts > 1:
            w_down = self._owned(self.down, alone)
            w_up = self._owned(self.up, alone)
            b_up = b_up[alone] if b_up is not None and b_up.dim() == 2 else b_up
            factor = self.expert_scale
        return MergeInput(
            w_down,
            self.down.bias,
            w_up,
            b_up,
            None if self.norm is None else self.norm.weight,
            None if self.norm is None else self.norm.bias,
            self._factor(),
            factor if self.up.assignment is not None else 1.0,
            initial,
            factor,
        )

    def _owned(self, projection: Projection, expert: int) -> Tensor:
        """The weight where the expert owns it, elsewhere what the projection started from."""
        if projection.assignment is None:
            return projection.weight
        initial = 0 if projection.initial is None else projection.initial
        return torch.where(projection.assignment.eq(expert), projection.weight, initial)

    @torch.no_grad()
    def merge(self, rule: str | None = None, *, expert: int | None = None) -> DenseAdapter:
        """The dense adapter for inference (Eq. 7 and 8), in plain PyTorch.

        Args:
            rule: "mean" or "jigsaw"; None is the layer's `merge_rule`, which evaluation mode computes too.
            expert: only this one, as it runs by itself, in place of all by a rule.

        Raises:
            TypeError: `expert` is no whole number.
            ValueError: `rule` is neither, or there is no such expert.
        """
        return self.dense_from(merge_adapters([self.merge_input(rule, expert)])[0])

    def dense_from(self, merged: MergedWeights) -> DenseAdapter:
        """A plain adapter shaped like this layer that holds merged weights."""
        eps = 1e-6 if self.norm is None else self.norm.eps
        dense = DenseAdapter(self.dim, self.bottleneck, self.activation, self.norm is not None, eps, device="meta")
        for linear, weight, bias in ((dense.down, merged.w_down, merged.b_down), (dense.up, merged.w_up, merged.b_up)):
            linear.weight = nn.Parameter(weight)
            linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        scale = "learnable" if isinstance(self.scale, nn.Parameter) else self.scale
        return (
            f"dim={self.dim}, bottleneck={self.bottleneck}, experts={self.num_experts}, activation={self.activation}, "
            f"scale={scale}, sparse={'pruned' if self.pruned else self.sparse}, merge={self.merge_rule}"
        )
