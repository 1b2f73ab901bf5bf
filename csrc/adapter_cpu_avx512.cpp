// The adapter's tile for AVX-512; CMakeLists.txt sets the compiler's flags.
#include "adapter_cpu_tile.h"

#if defined(__GNUC__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "adapter_cpu_body.h"

const mosa::CpuKernels* mosa::cpu_kernels_avx512() { return &kKernels; }
#else
const mosa::CpuKernels* mosa::cpu_kernels_avx512() { return nullptr; }
#endif
