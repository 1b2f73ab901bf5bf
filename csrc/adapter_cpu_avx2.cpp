// The adapter's tile for AVX2 and FMA; CMakeLists.txt sets the compiler's flags.
#include "adapter_cpu_tile.h"

#if defined(__GNUC__) && defined(__AVX2__) && defined(__FMA__)
#include "adapter_cpu_body.h"

const mosa::CpuKernels* mosa::cpu_kernels_avx2() { return &kKernels; }
#else
const mosa::CpuKernels* mosa::cpu_kernels_avx2() { return nullptr; }
#endif
