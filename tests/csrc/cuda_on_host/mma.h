// Products of 16 x 16 tiles by a warp. Every lane holds eight numbers of the result, spread over the tile so that no
// program can know which, and what they are made of: half the rows of A, a column of B.
#pragma once

#include <cmath>
#include <numeric>
#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

// Products of a warp since the start, for tests to read.
extern "C" {
__attribute__((visibility("default"), used)) inline long cuda_on_host_products = 0;
}

namespace nvcuda {
namespace wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};
}  // namespace precision

// Rounds to ten bits of mantissa, ties away from zero.
inline float __float_to_tf32(float value) {
  const uint32_t bits = mosa::float_to_bits(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? value : mosa::bits_to_float((bits + 0x1000u) & ~0x1fffu);
}

namespace on_host {

inline float value_of(float value) { return value; }
inline float value_of(__half value) { return __half2float(value); }
inline float value_of(__nv_bfloat16 value) { return __bfloat162float(value); }

// The units look at no more bits of a TF32 operand than it has.
template <typename T>
float seen(float value) {
  return std::is_same_v<T, precision::tf32> ? mosa::bits_to_float(mosa::float_to_bits(value) & ~0x1fffu) : value;
}

inline int lane() { return static_cast<int>(cuda_on_host::block->current % cuda_on_host::kWarpSize); }

template <typename T>
void check_address(const T* address, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(address) % 32 == 0 && stride * sizeof(T) % 16 == 0) return;
  std::fprintf(stderr, "a tile has to begin at 32 bytes and its rows at 16: address %p, %u elements a row\n",
               static_cast<const void*>(address), stride);
  std::abort();
}

}  // namespace on_host

// Element i of a fragment of m by n numbers stands in this row and column of the tile.
template <int m, int n>
struct Spread {
  static_assert(cuda_on_host::kWarpSize % n == 0, "a lane has numbers of one column of the result");
  static constexpr int num_elements = m * n / cuda_on_host::kWarpSize;
  float x[num_elements];
  static int row(int i) { return (i * cuda_on_host::kWarpSize + on_host::lane()) / n; }
  static int column(int) { return on_host::lane() % n; }
};

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment;
template <int m, int n, int k>
struct fragment<accumulator, m, n, k, float, void> : Spread<m, n> {};
template <int m, int n, int k, typename T, typename Layout>
struct fragment<matrix_a, m, n, k, T, Layout> {
  static constexpr size_t lines = std::is_same_v<Layout, row_major> ? m : k, line_elements = m * k / lines;
  static constexpr int num_elements = Spread<m, n>::num_elements * k;
  float x[num_elements];
  static int row(int i) { return Spread<m, n>::row(i / k); }
  static int column(int i) { return i % k; }
};
template <int m, int n, int k, typename T, typename Layout>
struct fragment<matrix_b, m, n, k, T, Layout> {
  static constexpr size_t lines = std::is_same_v<Layout, row_major> ? k : n, line_elements = n * k / lines;
  static constexpr int num_elements = k;
  float x[num_elements];
  static int row(int i) { return i; }
  static int column(int) { return Spread<m, n>::column(0); }
};

template <int m, int n, int k>
void fill_fragment(fragment<accumulator, m, n, k, float>& to, float value) {
  for (float& x : to.x) x = value;
}

template <typename Use, int m, int n, int k, typename T, typename Layout, typename Stored>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& to, const Stored* from, unsigned stride) {
  using Fragment = fragment<Use, m, n, k, T, Layout>;
  on_host::check_address(from, stride);
  // A lane may read any part of the tile.
  for (size_t line = 0; line < Fragment::lines; ++line) {
    cuda_on_host::races::read(from + line * stride, Fragment::line_elements * sizeof(Stored));
  }
  const cuda_on_host::races::Unwatched unwatched;
  for (int i = 0; i < Fragment::num_elements; ++i) {
    const auto row = static_cast<size_t>(Fragment::row(i));
    const auto column = static_cast<size_t>(Fragment::column(i));
    to.x[i] =
        on_host::value_of(from[std::is_same_v<Layout, row_major> ? row * stride + column : column * stride + row]);
  }
}

#ifdef CUDA_ON_HOST_TRUNCATES
// How the units of a GPU add up: four products and what was there before, each cut off at the last bit that the largest
// of them has in float32, and so is the sum (Fasi, Higham, Mikaitis and Pranesh, 2021, found it so on a V100, and a few
// bits more on later ones).
inline float add_products(float before, const float* products, int count) {
  double largest = std::fabs(before);
  for (int i = 0; i < count; ++i) largest = std::max<double>(largest, std::fabs(products[i]));
  if (largest == 0.0 || !std::isfinite(largest)) return std::accumulate(products, products + count, before);
  const double bit = std::ldexp(1.0, std::ilogb(largest) - 23);
  double sum = std::trunc(before / bit);
  for (int i = 0; i < count; ++i) sum += std::trunc(products[i] / bit);
  if (sum == 0.0) return 0.0f;
  const double last = std::ldexp(1.0, std::max(std::ilogb(sum) - 23, 0));
  return static_cast<float>(std::trunc(sum / last) * last * bit);
}
#endif

template <int m, int n, int k, typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, m, n, k, float>& to, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, float>& c) {
  if (on_host::lane() == 0) {
    const cuda_on_host::races::Unwatched unwatched;
    ++cuda_on_host_products;
  }
  for (int i = 0; i < to.num_elements; ++i) {
    float product[k];
    for (int depth = 0; depth < k; ++depth) {
      product[depth] = on_host::seen<T>(a.x[i * k + depth]) * on_host::seen<T>(b.x[depth]);
    }
    float sum = c.x[i];
#ifdef CUDA_ON_HOST_TRUNCATES
    for (int depth = 0; depth < k; depth += 4) sum = add_products(sum, product + depth, 4);
#else
    for (int depth = 0; depth < k; ++depth) sum += product[depth];
#endif
    to.x[i] = sum;
  }
}

template <int m, int n, int k>
void store_matrix_sync(float* to, const fragment<accumulator, m, n, k, float>& from, unsigned stride, layout_t layout) {
  on_host::check_address(to, stride);
  for (int i = 0; i < from.num_elements; ++i) {
    const size_t row = static_cast<size_t>(from.row(i));
    const size_t column = static_cast<size_t>(from.column(i));
    to[layout == mem_row_major ? row * stride + column : column * stride + row] = from.x[i];
  }
}

}  // namespace wmma
}  // namespace nvcuda
