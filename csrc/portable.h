// Marks functions that the CPU and the GPU share.
#pragma once

#if defined(__CUDACC__)
#define MOSA_HOST_DEVICE __host__ __device__
#else
#define MOSA_HOST_DEVICE
#endif
