// Products of 16 x 16 tiles in the registers of a warp: on the matrix units where the architecture has them for the
// element type (fp16 from sm_70, bf16 and TF32 from sm_80), with plain fused multiply-adds for float32 elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <cstdint>

#include "dtype.h"

namespace mosa {

constexpr int kWarp = 32;
constexpr int kUnit = 16;  // rows, columns and depth of a tile

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kHasBFloat16Units = false;
constexpr bool kHasFloat32Units = false;
#else
constexpr bool kHasBFloat16Units = true;
constexpr bool kHasFloat32Units = true;
#endif

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename E>
struct Element;
template <>
struct Element<float> {
  static constexpr uint8_t kDType = kFloat32;
  static constexpr bool kOnUnits = kHasFloat32Units;
};
template <>
struct Element<__half> {
  static constexpr uint8_t kDType = kFloat16;
  static constexpr bool kOnUnits = true;
};
template <>
struct Element<__nv_bfloat16> {
  static constexpr uint8_t kDType = kBFloat16;
  static constexpr bool kOnUnits = kHasBFloat16Units;
};

// Whether there are kernels for an element type. Where nothing multiplies bf16, products of bf16 tensors are float32's:
// as many multiply-adds, without a conversion of every operand, and 97 s less to build for sm_75 (of one slow core).
template <typename E>
constexpr bool kServed = Element<E>::kOnUnits || Element<E>::kDType == kFloat32;

// How an operand lies in memory: as the product reads it, or with rows and columns exchanged.
template <bool kTransposed>
struct Layout {
  using Type = nvcuda::wmma::row_major;
};
template <>
struct Layout<true> {
  using Type = nvcuda::wmma::col_major;
};

// A tile of 16 rows and columns, or of 8 one way for TF32, from shared memory; the whole warp takes part.
//
// Of fp16 the compiler sees that the address is one of shared memory. Of bf16 and TF32 it does not (CUDA 12.9
// and 13.0), loads word by word from generic addresses, and exchanges rows and columns by moves: on sm_90 a step of
// dout^T h with four tiles takes 69 instructions so, and 27 as it is here.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define MOSA_LOAD_TILE(use, layout, shape_and_type)                                                         \
  asm volatile("wmma.load." use ".sync.aligned." layout "." shape_and_type " {%0, %1, %2, %3}, [%4], %5;"   \
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])                                 \
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(static_cast<uint32_t>(ld)) \
               : "memory")
#define MOSA_LOAD_TILE_OF(use, layout)                    \
  if constexpr (sizeof(E) == sizeof(float)) {             \
    MOSA_LOAD_TILE(use, layout, "m16n16k8.shared.tf32");  \
  } else {                                                \
    MOSA_LOAD_TILE(use, layout, "m16n16k16.shared.bf16"); \
  }

template <bool kLeft, bool kTransposed, typename E, typename Fragment>
__device__ inline void load_tile(Fragment& to, const E* from, int ld) {
  if constexpr (Element<E>::kDType == kFloat16) {
    nvcuda::wmma::load_matrix_sync(to, from, static_cast<unsigned>(ld));
  } else {
    uint32_t word[4];
    static_assert(sizeof(word) == sizeof(to.x), "the fragment of a lane");
    if constexpr (kLeft && kTransposed) {
      MOSA_LOAD_TILE_OF("a", "col")
    } else if constexpr (kLeft) {
      MOSA_LOAD_TILE_OF("a", "row")
    } else if constexpr (kTransposed) {
      MOSA_LOAD_TILE_OF("b", "col")
    } else {
      MOSA_LOAD_TILE_OF("b", "row")
    }
    memcpy(to.x, word, sizeof(word));
  }
}
#undef MOSA_LOAD_TILE_OF
#undef MOSA_LOAD_TILE
#else
template <bool kLeft, bool kTransposed, typename E, typename Fragment>
__device__ inline void load_tile(Fragment& to, const E* from, int ld) {
  nvcuda::wmma::load_matrix_sync(to, from, static_cast<unsigned>(ld));
}
#endif

// Which tiles of B a product has to look at: bit j of of(k) for the tile at depth 16 k of B_j. The same in every lane.
struct AllTiles {
  static constexpr bool kSome = false;
  __device__ uint32_t of(int) const { return ~0u; }
};

// Accumulators of kTiles neighbouring tiles in a row.
template <typename E, int kTiles, bool kOnUnits = Element<E>::kOnUnits>
struct Accumulator;

// fp16 and bf16.
template <typename E, int kTiles>
struct Accumulator<E, kTiles, true> {
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kUnit, kUnit, kUnit, float> tile[kTiles];

  __device__ void clear() {
    for (int j = 0; j < kTiles; ++j) nvcuda::wmma::fill_fragment(tile[j], 0.0f);
  }

  // tile[j] += A B_j with A [16, depth] and B_j [depth, 16]; B_j begins `step` elements after B_(j-1). The whole warp
  // takes part.
  template <bool kTransposedA, bool kTransposedB, int kAtOnce = 1, typename Tiles = AllTiles>
  __device__ void multiply(const E* a, int lda, const E* b, int ldb, int step, int depth, bool,
                           const Tiles& tiles = Tiles()) {
#pragma unroll kAtOnce
    for (int k = 0; k < depth; k += kUnit) {
      const uint32_t marked = tiles.of(k / kUnit);
      if (Tiles::kSome && marked == 0) continue;
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kUnit, kUnit, kUnit, E, typename Layout<kTransposedA>::Type> left;
      load_tile<true, kTransposedA>(left, a + k * (kTransposedA ? lda : 1), lda);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (Tiles::kSome && (marked >> j & 1u) == 0) continue;
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kUnit, kUnit, kUnit, E, typename Layout<kTransposedB>::Type>
            right;
        load_tile<false, kTransposedB>(right, b + j * step + k * (kTransposedB ? 1 : ldb), ldb);
        nvcuda::wmma::mma_sync(tile[j], left, right, tile[j]);
      }
    }
  }

  __device__ void store(int j, float* to, int ld) const {
    nvcuda::wmma::store_matrix_sync(to, tile[j], static_cast<unsigned>(ld), nvcuda::wmma::mem_row_major);
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// fp32: both operands as the sum of two TF32 numbers, of whose products the smallest is left out; or one TF32 product.
// The units cut off what does not fit into a sum, where fp32 rounds: errors of one sign, which grow with the depth
// (Ootomo and Yokota, 2022). So they add up a step alone, and its sum is added as fp32.
template <int kTiles>
struct Accumulator<float, kTiles, true> {
  static constexpr int kDepth = 8;
  using Result = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kUnit, kUnit, kDepth, float>;
  Result tile[kTiles];

  __device__ void clear() {
    for (int j = 0; j < kTiles; ++j) nvcuda::wmma::fill_fragment(tile[j], 0.0f);
  }

  template <typename Fragment>
  __device__ static void split(Fragment& value, Fragment& rest) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(value.num_elements); ++i) {
      const float whole = value.x[i];
      value.x[i] = nvcuda::wmma::__float_to_tf32(whole);
      rest.x[i] = nvcuda::wmma::__float_to_tf32(whole - value.x[i]);
    }
  }

  template <bool kTransposedA, bool kTransposedB, int = 1, typename Tiles = AllTiles>
  __device__ void multiply(const float* a, int lda, const float* b, int ldb, int step, int depth, bool tf32,
                           const Tiles& tiles = Tiles()) {
    using TF32 = nvcuda::wmma::precision::tf32;
#pragma unroll 1
    for (int k = 0; k < depth; k += kDepth) {
      const uint32_t marked = tiles.of(k / kUnit);
      if (Tiles::kSome && marked == 0) continue;
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kUnit, kUnit, kDepth, TF32, typename Layout<kTransposedA>::Type>
          left, left_rest;
      load_tile<true, kTransposedA>(left, a + k * (kTransposedA ? lda : 1), lda);
      split(left, left_rest);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (Tiles::kSome && (marked >> j & 1u) == 0) continue;
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kUnit, kUnit, kDepth, TF32, typename Layout<kTransposedB>::Type>
            right, right_rest;
        load_tile<false, kTransposedB>(right, b + j * step + k * (kTransposedB ? 1 : ldb), ldb);
        split(right, right_rest);
        if (tf32) {
          nvcuda::wmma::mma_sync(tile[j], left, right, tile[j]);
          continue;
        }
        Result sum;
        nvcuda::wmma::fill_fragment(sum, 0.0f);
        nvcuda::wmma::mma_sync(sum, left_rest, right, sum);
        nvcuda::wmma::mma_sync(sum, left, right_rest, sum);
        nvcuda::wmma::mma_sync(sum, left, right, sum);
#pragma unroll
        for (int i = 0; i < static_cast<int>(sum.num_elements); ++i) tile[j].x[i] += sum.x[i];
      }
    }
  }

  __device__ void store(int j, float* to, int ld) const {
    nvcuda::wmma::store_matrix_sync(to, tile[j], static_cast<unsigned>(ld), nvcuda::wmma::mem_row_major);
  }
};
#endif

// float32 without matrix units, the only type that comes so: two lanes share a row.
template <typename E, int kTiles>
struct Accumulator<E, kTiles, false> {
  static constexpr int kColumns = kUnit / 2;
  float value[kTiles][kColumns];

  __device__ static int row() { return static_cast<int>(threadIdx.x) % kWarp / 2; }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % 2 * kColumns; }

  __device__ void clear() {
    for (int j = 0; j < kTiles; ++j) {
      for (int i = 0; i < kColumns; ++i) value[j][i] = 0.0f;
    }
  }

  template <bool kTransposedA, bool kTransposedB, int = 1, typename Tiles = AllTiles>
  __device__ void multiply(const E* a, int lda, const E* b, int ldb, int step, int depth, bool,
                           const Tiles& tiles = Tiles()) {
    const E* own_row = a + row() * (kTransposedA ? 1 : lda);
    const E* own_columns = b + column() * (kTransposedB ? ldb : 1);
#pragma unroll 2
    for (int k = 0; k < depth; ++k) {
      const uint32_t marked = tiles.of(k / kUnit);
      if (Tiles::kSome && marked == 0) continue;
      const float left = to_float(own_row[k * (kTransposedA ? lda : 1)]);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (Tiles::kSome && (marked >> j & 1u) == 0) continue;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float right =
              to_float(own_columns[j * step + i * (kTransposedB ? ldb : 1) + k * (kTransposedB ? 1 : ldb)]);
          value[j][i] = fmaf(left, right, value[j][i]);
        }
      }
    }
  }

  __device__ void store(int j, float* to, int ld) const {
    for (int i = 0; i < kColumns; ++i) to[row() * ld + column() + i] = value[j][i];
  }
};

}  // namespace mosa
