"""The operators. Importing any of them registers the FLOP formulas of all."""

from mosa_kernels.functional import flops

__all__ = ["flops"]
