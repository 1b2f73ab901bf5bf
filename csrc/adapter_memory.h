// Vectors of eight neighbours between global memory, registers and shared memory; 16 bytes at a time where they lie so.
#pragma once

#include <cuda_pipeline.h>

#include <cstdint>

#include "adapter.h"
#include "adapter_units.h"
#include "dtype.h"

namespace mosa {

constexpr int kVector = 8;
constexpr int kWideBytes = 16;

struct alignas(kWideBytes) Wide {
  uint32_t word[4];
};

// Eight neighbours as they lie in memory: float32 in eight words, 16-bit types in the first four.
template <int kWords>
struct RawOf {
  static_assert(kWords == 4 || kWords == 8, "with four words for 16-bit types alone");
  uint32_t word[kWords];
};
using Raw = RawOf<8>;

// Elements index to index + count (at most eight; zeros beyond). `wide`: that address is a multiple of 16 bytes.
template <int kWords = 8>
__device__ inline RawOf<kWords> load_raw(const void* data, uint8_t dtype, bool wide, int64_t index, int count) {
  RawOf<kWords> raw = {};
  if (count <= 0) return raw;
  if (wide && count >= kVector) {
    if (kWords == 8 && dtype == kFloat32) {
      const Wide* from = reinterpret_cast<const Wide*>(static_cast<const float*>(data) + index);
      const Wide halves[2] = {from[0], from[1]};  // whole, or they are loaded a word at a time
#pragma unroll
      for (int i = 0; i < kWords; ++i) raw.word[i] = halves[i / 4].word[i % 4];
    } else {
      const Wide from = *reinterpret_cast<const Wide*>(static_cast<const uint16_t*>(data) + index);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.word[i] = from.word[i];
    }
  } else if (kWords == 8 && dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (i < count) raw.word[i] = static_cast<const uint32_t*>(data)[index + i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) {
        raw.word[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index + i]) << (16 * (i % 2));
      }
    }
  }
  return raw;
}

__device__ inline float from_bits(uint32_t bits, uint8_t dtype) {
  if (dtype == kFloat16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return bfloat16_to_float(static_cast<uint16_t>(bits));
}

template <int kWords>
__device__ inline void unpack(const RawOf<kWords>& raw, uint8_t dtype, float (&value)[kVector]) {
  if (kWords == 8 && dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = bits_to_float(raw.word[i % kWords]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = from_bits((raw.word[i / 2] >> (16 * (i % 2))) & 0xffffu, dtype);
  }
}

template <typename Tensor>
__device__ inline void load_vector(const Tensor& from, int64_t index, int count, float (&value)[kVector]) {
  unpack(load_raw(from.data, from.dtype, from.wide, index, count), from.dtype, value);
}

// A vector that is loaded before a product and used after it, as far as registers allow: what is float32 beside a half
// precision product is loaded when it is used. (Held all the same, tokens had the bf16 forward kernel on sm_90 spill
// 120 bytes in place of 48 at r = 64, and 56 in place of none at r = 32.)
template <typename E>
struct EarlyVector {
  static constexpr int kWords = sizeof(E) == sizeof(float) ? 8 : 4;
  RawOf<kWords> raw;

  template <typename Tensor>
  __device__ static constexpr bool early(const Tensor& from) {
    return kWords == 8 || from.dtype != kFloat32;
  }
  template <typename Tensor>
  __device__ void begin(const Tensor& from, int64_t index, int count) {
    if (early(from)) raw = load_raw<kWords>(from.data, from.dtype, from.wide, index, count);
  }
  template <typename Tensor>
  __device__ void finish(const Tensor& from, int64_t index, int count, float (&value)[kVector]) const {
    if (early(from)) {
      unpack(raw, from.dtype, value);
    } else {
      load_vector(from, index, count, value);
    }
  }

  // The same of eight units of a row (adapter_owned.h).
  template <typename Tensor, typename Units>
  __device__ void begin(const Tensor& from, const Units& units, int64_t row, int column, int limit) {
    if (early(from)) raw = units.template load<kWords>(from, row, column, limit);
  }
  template <typename Tensor, typename Units>
  __device__ void finish(const Tensor& from, const Units& units, int64_t row, int column, int limit,
                         float (&value)[kVector]) const {
    if (early(from)) {
      unpack(raw, from.dtype, value);
    } else {
      unpack(units.template load<8>(from, row, column, limit), from.dtype, value);
    }
  }
};

__device__ inline float load_number(const AdapterTensor& from, int64_t index) {
  if (from.dtype == kFloat32) return static_cast<const float*>(from.data)[index];
  return from_bits(static_cast<const uint16_t*>(from.data)[index], from.dtype);
}

__device__ inline uint16_t to_bits(float value, uint8_t dtype) {
  if (dtype == kFloat16) return __half_as_ushort(__float2half_rn(value));
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Two neighbours as they lie in memory.
__device__ inline uint32_t pack_pair(float low, float high, uint8_t dtype) {
  uint32_t bits;
  if (dtype == kFloat16) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

__device__ inline void store_number(void* data, uint8_t dtype, int64_t index, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    static_cast<uint16_t*>(data)[index] = to_bits(value, dtype);
  }
}

__device__ inline void store_vector(void* data, uint8_t dtype, bool wide, int64_t index, int count,
                                    const float (&value)[kVector]) {
  if (dtype == kFloat32) {
    float* to = static_cast<float*>(data) + index;
    if (wide && count >= kVector) {
      Wide* wide_to = reinterpret_cast<Wide*>(to);
      for (int half = 0; half < 2; ++half) {
        Wide bits;
        for (int i = 0; i < 4; ++i) bits.word[i] = float_to_bits(value[half * 4 + i]);
        wide_to[half] = bits;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < count) to[i] = value[i];
      }
    }
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(data) + index;
  if (wide && count >= kVector) {
    Wide bits;
    for (int i = 0; i < 4; ++i) bits.word[i] = pack_pair(value[2 * i], value[2 * i + 1], dtype);
    *reinterpret_cast<Wide*>(to) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) to[i] = to_bits(value[i], dtype);
    }
  }
}

// Moves the first kBy values behind the others. A loop over a vector that is not unrolled reaches all of it so, at
// places that are known when it is compiled: values in registers have no other index.
template <int kBy, int kCount>
__device__ inline void rotate(float (&value)[kCount]) {
  float first[kBy];
#pragma unroll
  for (int i = 0; i < kBy; ++i) first[i] = value[i];
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = i + kBy < kCount ? value[(i + kBy) % kCount] : first[(i + kBy) % kCount];
}

// A vector of a tile in shared memory, whose address is a multiple of 16 bytes.
template <typename E>
__device__ inline void put_vector(E* to, const float (&value)[kVector]) {
  store_vector(to, Element<E>::kDType, true, 0, kVector, value);
}

template <typename E>
__device__ inline void unpack_pair(uint32_t bits, float& low, float& high) {
  low = from_bits(bits & 0xffffu, Element<E>::kDType);
  high = from_bits(bits >> 16, Element<E>::kDType);
}

// Two numbers as a product takes them.
template <typename E>
__device__ inline void round_pair(float& low, float& high) {
  if constexpr (sizeof(E) != sizeof(float)) unpack_pair<E>(pack_pair(low, high, Element<E>::kDType), low, high);
}

// Leaves in `value` what was put, rounded. (Rounded first and then put, 16-bit numbers would be packed twice.)
template <typename E>
__device__ inline void put_rounded(E* to, float (&value)[kVector]) {
  if constexpr (sizeof(E) == sizeof(float)) {
    put_vector(to, value);
  } else {
    Wide bits;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits.word[i] = pack_pair(value[2 * i], value[2 * i + 1], Element<E>::kDType);
      unpack_pair<E>(bits.word[i], value[2 * i], value[2 * i + 1]);
    }
    *reinterpret_cast<Wide*>(to) = bits;
  }
}

// float32 by CUDA's own type, which is loaded whole: words of Wide were loaded one by one where some are used as bits
// and some as numbers (at r = 128 the plain backward kernel over tokens had 80 such loads, and has 36), which of them
// differed from one run of nvcc 13.0 to the next, and with it what was spilled. (In load_raw, and so for every vector,
// it had the kernels for any call spill 24 to 40 bytes more at r = 128 and 256.)
template <typename E>
__device__ inline void get_vector(const E* from, float (&value)[kVector]) {
  if constexpr (sizeof(E) == sizeof(float)) {
    for (int half = 0; half < 2; ++half) {
      const float4 four = reinterpret_cast<const float4*>(from)[half];
      value[4 * half] = four.x;
      value[4 * half + 1] = four.y;
      value[4 * half + 2] = four.z;
      value[4 * half + 3] = four.w;
    }
  } else {
    unpack(load_raw(from, Element<E>::kDType, true, 0, kVector), Element<E>::kDType, value);
  }
}

// The first `taken` of 16 bytes, an even number, into shared memory, zeros after them. The functions of CUDA's header
// have a branch for each number of bytes, and their wait is no barrier for the compiler.
__device__ inline void copy_wide(void* to, const void* from, int taken) {
#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__)
  __pipeline_memcpy_async(to, from, kWideBytes, static_cast<size_t>(kWideBytes - taken));
#elif __CUDA_ARCH__ >= 800
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const size_t global = __cvta_generic_to_global(from);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(taken) : "memory");
#else
  const RawOf<4> raw = load_raw<4>(from, kFloat16, true, 0, taken / 2);
  Wide bits;
#pragma unroll
  for (int i = 0; i < 4; ++i) bits.word[i] = raw.word[i];
  *static_cast<Wide*>(to) = bits;
#endif
}

// Starts the copy of the first `count` elements of a vector into shared memory, zeros after them; both ends lie at
// multiples of 16 bytes. commit_copies and wait_for_copies finish it for the thread that started it, a barrier for the
// others.
template <typename E>
__device__ inline void start_copy(E* to, const E* from, int count) {
  constexpr int kStep = kWideBytes / static_cast<int>(sizeof(E));
#pragma unroll
  for (int i = 0; i < kVector; i += kStep) {
    const int taken = min(max(count - i, 0), kStep);
    copy_wide(to + i, taken > 0 ? from + i : from, taken * static_cast<int>(sizeof(E)));
  }
}

__device__ inline void commit_copies() { __pipeline_commit(); }
__device__ inline void wait_for_copies() {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 0;" ::: "memory");
#else
  __pipeline_wait_prior(0);
#endif
}

// Eight owners of neighbouring entries; 255 beyond count.
struct Owners {
  uint32_t word[2];
  __device__ int of(int i) const { return static_cast<int>((word[i / 4] >> (8 * (i % 4))) & 0xffu); }
  // All ones where neighbours 2 i and 2 i + 1, 16 bits each, belong to expert e.
  __device__ uint32_t pair_of(int i, int e) const {
    const uint32_t equal = __vcmpeq4(word[i / 2], static_cast<uint32_t>(e) * 0x01010101u);  // a byte for each
    return __byte_perm(equal, 0, i % 2 == 0 ? 0x1100 : 0x3322);
  }
};

__device__ inline Owners load_owners(const uint8_t* data, bool wide, int64_t index, int count) {
  Owners owners = {{~0u, ~0u}};
  if (wide && count >= kVector) {
    struct alignas(8) Pair {
      uint32_t word[2];
    };
    const Pair pair = *reinterpret_cast<const Pair*>(data + index);
    owners.word[0] = pair.word[0];
    owners.word[1] = pair.word[1];
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const uint32_t shift = 8 * (i % 4);
      if (i < count) {
        owners.word[i / 4] = (owners.word[i / 4] & ~(0xffu << shift)) | static_cast<uint32_t>(data[index + i]) << shift;
      }
    }
  }
  return owners;
}

}  // namespace mosa
