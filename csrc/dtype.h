// Element types and their conversion to and from fp32, bit by bit, the same on CPU and GPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace mosa {

enum DType : uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kDTypeCount = 3 };

MOSA_HOST_DEVICE inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MOSA_HOST_DEVICE inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// yes or no. On a CPU by its bits, since compilers make branches of choices, and no vector code of loops with branches.
MOSA_HOST_DEVICE inline uint32_t choose(bool condition, uint32_t yes, uint32_t no) {
#if defined(__CUDA_ARCH__)
  return condition ? yes : no;
#else
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
#endif
}

MOSA_HOST_DEVICE inline float choose(bool condition, float yes, float no) {
  return bits_to_float(choose(condition, float_to_bits(yes), float_to_bits(no)));
}

MOSA_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest, ties to even.
MOSA_HOST_DEVICE inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>(choose((bits & 0x7fffffffu) > 0x7f800000u, quiet, rounded));  // NaN stays NaN
}

MOSA_HOST_DEVICE inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
#if defined(__CUDA_ARCH__)  // the merge takes 46 registers with this branch on sm_75, and 49 without
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
#endif
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = float_to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t infinite_or_nan = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  const uint32_t finite = choose(magnitude < 0x400u, subnormal, normal);
  return bits_to_float(sign | choose(magnitude < 0x7c00u, finite, infinite_or_nan));
}

// Rounds to nearest, ties to even; beyond the range to infinity.
MOSA_HOST_DEVICE inline uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 leaves units of 2^-24 in the last bits of the sum, rounded by the adder itself.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = choose(magnitude < 0x38800000u, subnormal, normal);  // below 2^-14
  const uint32_t infinite_or_nan = choose(magnitude > 0x7f800000u, 0x7e00u, 0x7c00u);
  return static_cast<uint16_t>(sign | choose(magnitude < 0x477ff000u, finite, infinite_or_nan));  // up to 65520
}

MOSA_HOST_DEVICE inline float load_float(const void* data, uint8_t dtype, int64_t index) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

MOSA_HOST_DEVICE inline void store_float(void* data, uint8_t dtype, int64_t index, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = dtype == kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
  }
}

}  // namespace mosa
