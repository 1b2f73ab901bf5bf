"""Fused kernels in Triton. `backend` holds what every backend offers; it imports triton only when it has to run."""
