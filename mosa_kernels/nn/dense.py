"""The dense adapter: what is left of MoSA for inference, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mosa_kernels.backends.activations import ACTIVATIONS
from mosa_kernels.nn.options import check_choice, check_count, check_not_negative, check_placement


class DenseAdapter(nn.Module):
    """``[x] + [residual] + up(act(down(norm(x))))`` (arXiv 2312.02923, Eq. 1 and 8).

    A merged adapter folds LayerNorm's affine part into `down` and the scale into `up`: its norm has no parameters
    and it computes with `torch.nn` alone, so it exports, traces and compiles like any module.

    Args:
        dim: width d.
        bottleneck: r.
        activation: one of "gelu", "gelu_tanh", "relu", "silu", "identity".
        norm: whether x is normalised first, without affine parameters.
        norm_eps: its epsilon.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of range.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        activation: str = "gelu",
        norm: bool = True,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("bottleneck", bottleneck)):
            check_count(name, size)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_not_negative("norm_eps", norm_eps)
        check_placement(device, dtype)
        self.activation, self.norm, self.norm_eps = activation, norm, norm_eps
        self.down = nn.Linear(dim, bottleneck, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None, add_input: bool = True) -> Tensor:
        """Tokens [..., d] to [..., d]."""
        u = F.layer_norm(x, x.shape[-1:], None, None, self.norm_eps) if self.norm else x
        out = self.up(ACTIVATIONS[self.activation].forward(self.down(u)))
        if add_input:
            out = x + out
        return out if residual is None else out + residual

    def extra_repr(self) -> str:
        return f"activation={self.activation}, norm={self.norm}"
