// The adapter's tile for any CPU; CMakeLists.txt sets the compiler's flags.
#include "adapter_cpu_tile.h"

#if defined(__GNUC__)
#include "adapter_cpu_body.h"

const mosa::CpuKernels* mosa::cpu_kernels_portable() { return &kKernels; }
#else
const mosa::CpuKernels* mosa::cpu_kernels_portable() { return nullptr; }
#endif
