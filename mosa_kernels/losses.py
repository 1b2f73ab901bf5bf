"""The training objective (arXiv 2312.02923, Eq. 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mosa_kernels.backends.consistency import cross_entropy
from mosa_kernels.functional.alignment import feature_alignment
from mosa_kernels.functional.consistency import OPERATOR, check_classes, check_smoothing, check_target, consistency
from mosa_kernels.nn.options import check_flag, check_not_negative

ALIGNMENTS = ("none", "shallow", "deep", "all")


class TwoPassOutput(Protocol):
    """What the loss reads of the output of `two_pass`."""

    @property
    def logits1(self) -> Tensor: ...  # [B, C]

    @property
    def logits2(self) -> Tensor | None: ...

    @property
    def features1(self) -> Sequence[Tensor | None] | None: ...  # one a block

    @property
    def features2(self) -> Sequence[Tensor | None] | None: ...


class LossParts(NamedTuple):
    """``total = cross_entropy + alpha * consistency + beta * alignment``, tensors []."""

    cross_entropy: Tensor
    consistency: Tensor  # (KL(p1 || p2) + KL(p2 || p1)) / 2
    alignment: Tensor  # the sum of the blocks' mean squared differences
    total: Tensor


class MoSALoss(nn.Module):
    """``CE(p1, y) + alpha / 2 (KL(p1 || p2) + KL(p2 || p1)) + beta sum_i MSE(f1_i, f2_i)`` (Eq. 6).

    Of L blocks, "shallow" aligns the first L // 2 (i <= L / 2), "deep" the others, "all" both. The authors' released
    code is `MoSALoss(beta=0, detach_targets=True)`, and where it aligns, `beta=0.01 / L` over six blocks, for example
    `align=range(6)`.

    Args:
        alpha: weight of the consistency of both predictions.
        beta: weight of the alignment of both passes' features.
        align: "none", "shallow" (the paper's best), "deep", "all", or the indices of blocks.
        label_smoothing: of the cross-entropy, from 0 to 1.
        detach_targets: whether the first distribution of each divergence is a constant.
        backend: of both operators; None for the automatic choice.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range; the message names it.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        align: str | Sequence[int] = "shallow",
        label_smoothing: float = 0.0,
        *,
        detach_targets: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, weight in (("alpha", alpha), ("beta", beta)):
            check_not_negative(name, weight)
        if isinstance(align, str):
            if align not in ALIGNMENTS:
                raise ValueError(f"align: expected one of {', '.join(ALIGNMENTS)} or block indices, got {align!r}")
        elif not isinstance(align, Iterable):
            raise TypeError(f"align: expected one of {', '.join(ALIGNMENTS)} or block indices, got {align!r}")
        else:
            align = tuple(align)
            if len(set(align)) != len(align) or any(not isinstance(block, int) or block < 0 for block in align):
                raise ValueError(f"align: expected different block indices of at least 0, got {list(align)}")
        check_smoothing(label_smoothing)
        check_flag("detach_targets", detach_targets)
        OPERATOR.check_name(backend)
        self.alpha, self.beta, self.align, self.backend = alpha, beta, align, backend
        self.label_smoothing, self.detach_targets = label_smoothing, detach_targets

    def needs_features(self, depth: int) -> tuple[int, ...]:
        """The indices of the blocks, of `depth`, whose features this loss compares; none when beta is 0.

        Raises:
            ValueError: `align` names a block that a model of this depth does not have.
        """
        if self.beta == 0:
            return ()
        if not isinstance(self.align, str):
            if any(block >= depth for block in self.align):
                raise ValueError(f"align: expected block indices below the depth, {depth}, got {list(self.align)}")
            return tuple(sorted(self.align))
        half = depth // 2
        return tuple(
            {"none": range(0), "shallow": range(half), "deep": range(half, depth), "all": range(depth)}[self.align]
        )

    def forward(self, out: TwoPassOutput | Tensor, target: Tensor) -> Tensor:
        """The loss, a tensor []. See `parts`."""
        return self.parts(out, target).total

    def parts(self, out: TwoPassOutput | Tensor, target: Tensor) -> LossParts:
        """The loss and what it is made of, in float32 at least.

        Args:
            out: of `two_pass`: logits1 and logits2 [B, C], features1 and features2 one tensor a block, where None is
                allowed at blocks that are not compared. With logits2 None, or logits alone in place of `out`, the
                loss is the cross-entropy.
            target: classes, int64 [B], or probabilities, floating point [B, C].

        Raises:
            TypeError: `out` is neither of both, or `target` is neither integer nor floating point.
            ValueError: a shape or (on the CPU) a class is wrong, or features that have to be compared are missing.
        """
        if isinstance(out, Tensor):
            logits1, logits2, features1, features2 = out, None, None, None
        elif not hasattr(out, "logits1"):
            raise TypeError(f"out: expected logits or the output of two_pass, got {type(out).__name__}")
        else:
            logits1, logits2, features1, features2 = out.logits1, out.logits2, out.features1, out.features2
        check_target(logits1, target)
        if logits2 is None or not self.alpha:
            check_classes(logits1, target)
            predicted = cross_entropy(logits1, target, self.label_smoothing)
            zero = alignment = divergence = predicted.new_zeros(())
            if logits2 is None:
                return LossParts(predicted, zero, zero, predicted)
        else:
            predicted, divergence = consistency(
                logits1,
                logits2,
                target,
                label_smoothing=self.label_smoothing,
                detach_targets=self.detach_targets,
                backend=self.backend,
            )
            alignment = predicted.new_zeros(())
        if self.beta and self.align not in ("none", ()):
            pairs = self._compared(features1, features2)
            if pairs is not None:
                alignment = feature_alignment(*pairs, backend=self.backend)
        half = divergence / 2
        return LossParts(predicted, half, alignment, predicted + self.alpha * half + self.beta * alignment)

    def _compared(
        self, features1: Sequence[Tensor | None] | None, features2: Sequence[Tensor | None] | None
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """The features of the blocks that are compared, or None where a short model has none."""
        for name, features in (("features1", features1), ("features2", features2)):
            if not features:
                raise ValueError(
                    f"{name}: expected the features of each block for align={self.align!r}, got {features}"
                )
        assert features1 is not None
        assert features2 is not None
        if len(features1) != len(features2):
            raise ValueError(f"features2: expected {len(features1)} blocks, as features1, got {len(features2)}")
        blocks = self.needs_features(len(features1))
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, features, found in (("features1", features1, chosen[0]), ("features2", features2, chosen[1])):
            for block in blocks:
                feature = features[block]
                if feature is None:
                    raise ValueError(f"{name}[{block}]: expected a tensor for align={self.align!r}, got None")
                found.append(feature)
        return chosen if blocks else None

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha}, beta={self.beta}, align={self.align!r}, label_smoothing={self.label_smoothing}, "
            f"detach_targets={self.detach_targets}"
        )
