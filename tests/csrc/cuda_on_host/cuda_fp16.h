// The type and the conversions of CUDA's header that our kernels use.
#pragma once

#include "cuda_runtime.h"
#include "dtype.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return mosa::float16_to_float(value.bits); }
inline __half __float2half_rn(float value) { return {mosa::float_to_float16(value)}; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
