// The adapter's tile for AVX-512 with products of bf16; CMakeLists.txt sets the compiler's flags.
#include "adapter_cpu_tile.h"

#if defined(__GNUC__) && defined(__AVX512BF16__)
#define MOSA_BF16_PRODUCTS
#include "adapter_cpu_body.h"

const mosa::CpuKernels* mosa::cpu_kernels_avx512_bf16() { return &kKernels; }
#else
const mosa::CpuKernels* mosa::cpu_kernels_avx512_bf16() { return nullptr; }
#endif
