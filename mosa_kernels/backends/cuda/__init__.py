"""The CUDA C++ backend: the kernels of csrc, called with addresses on the current stream."""
