// Random words as a function of a key and a counter, the same on CPU and GPU and in mosa_kernels/backends/dropout.py.
#pragma once

#include <cstdint>

#include "portable.h"

namespace mosa {

// A bijection of the 32-bit integers that mixes every input bit into every output bit.
MOSA_HOST_DEVICE inline uint32_t hash32(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x21f0aaadu;
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  return h ^ (h >> 15);
}

struct DrawKey {
  uint32_t low;
  uint32_t high;
};

MOSA_HOST_DEVICE inline DrawKey draw_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

MOSA_HOST_DEVICE inline uint32_t draw(DrawKey key, uint32_t counter) {
  return hash32(hash32(counter + key.low) ^ key.high);
}

}  // namespace mosa
