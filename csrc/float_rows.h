// Runs of elements of a type known at run time, read and written as fp32 on the CPU.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mosa {

// Inlined by force, here and in what calls it: each instruction set has its own vector code of these loops.
[[gnu::always_inline]] inline void load_floats(const void* from, uint8_t dtype, int64_t first, int count,
                                               float* __restrict to) {
  if (dtype == kFloat32) {
    for (int i = 0; i < count; ++i) to[i] = load_float(from, kFloat32, first + i);
  } else if (dtype == kFloat16) {
    for (int i = 0; i < count; ++i) to[i] = load_float(from, kFloat16, first + i);
  } else {
    for (int i = 0; i < count; ++i) to[i] = load_float(from, kBFloat16, first + i);
  }
}

[[gnu::always_inline]] inline void store_floats(void* to, uint8_t dtype, int64_t first, int count,
                                                const float* __restrict from) {
  if (dtype == kFloat32) {
    for (int i = 0; i < count; ++i) store_float(to, kFloat32, first + i, from[i]);
  } else if (dtype == kFloat16) {
    for (int i = 0; i < count; ++i) store_float(to, kFloat16, first + i, from[i]);
  } else {
    for (int i = 0; i < count; ++i) store_float(to, kBFloat16, first + i, from[i]);
  }
}

}  // namespace mosa
