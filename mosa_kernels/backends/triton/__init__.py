"""Fused kernels in Triton. `backend` holds what every backend offers and imports triton only when it is asked to run."""
