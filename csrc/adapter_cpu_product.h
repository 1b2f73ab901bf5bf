// Matrix products of a tile, for one instruction set: C[m, n] (+)= A[m, k] B[k, n].
//
// A stands row by row. B stands in panels of kPanel columns, all k rows of a panel together, so that the inner loop
// reads it in order; each loaded row of a panel serves kRowsAtOnce rows of C, which stay in registers.
#pragma once

#include "adapter_cpu_tile.h"
#include "adapter_cpu_vector.h"

namespace mosa {
namespace {

constexpr int kPanel = kPanelVectors * kLanes;
constexpr int kRowsAtOnce = 6;  // 6 x 4 sums and 4 loaded vectors of 32 registers; 6 x 2 and 2 of 16
// Rows of B worked on at once. 64, 128, 192: 111, 112, 116 GFLOP/s in fp32, 208, 221, 224 in bf16 (one core, d 768, r
// 64).
constexpr int kDepth = 128;

#if defined(MOSA_BF16_PRODUCTS)
typedef uint16_t Operand;
constexpr int kPair = 2;  // neighbouring k are multiplied and added by one instruction
#else
typedef float Operand;
constexpr int kPair = 1;
#endif

constexpr int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }
constexpr int64_t even(int64_t k) { return (k + 1) / 2 * 2; }

inline void set_operand(float* to, Vector v) { store(to, v); }
inline void set_operand(uint16_t* to, Vector v) { store(to, v); }
inline void set_operand(float* to, float v) { *to = v; }
inline void set_operand(uint16_t* to, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  *to = static_cast<uint16_t>(v != v ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Where element (row, column) of B stands.
inline int64_t panel_index(int64_t depth, int64_t row, int64_t column) {
  return (column / kPanel) * even(depth) * kPanel + (row / kPair) * kPair * kPanel + (column % kPanel) * kPair +
         row % kPair;
}
inline int64_t panel_elements(int64_t depth, int64_t columns) {
  return (padded(columns) + kPanel - 1) / kPanel * even(depth) * kPanel;
}

inline Vector multiply_add(const Operand* a, const Operand* b, Vector c) {
#if defined(MOSA_BF16_PRODUCTS)
  uint32_t pair;
  __builtin_memcpy(&pair, a, sizeof(pair));
  const __m512i left = _mm512_set1_epi32(static_cast<int>(pair));
  const __m512i right = _mm512_loadu_si512(b);
  return bit_cast<Vector>(_mm512_dpbf16_ps(bit_cast<__m512>(c), bit_cast<__m512bh>(left), bit_cast<__m512bh>(right)));
#else
  return c + splat(*a) * load(b);
#endif
}

// Sums begin at zero and are added to C at the end: over parts of kDepth, a long sum loses a tenth of what one chain of
// additions does (16384 of them: 7e-8 and 1e-6).
template <int Rows, int Vectors>
void product_block(int64_t depth, const Operand* a, int64_t a_stride, const Operand* b, float* c, int64_t c_stride,
                   bool accumulate) {
  Vector sums[Rows][Vectors] = {};
  for (int64_t k = 0; k < depth; k += kPair) {
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        sums[i][v] = multiply_add(a + i * a_stride + k, b + k * kPanel + v * kLanes * kPair, sums[i][v]);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + i * c_stride + v * kLanes;
      store(to, accumulate ? load(to) + sums[i][v] : sums[i][v]);
    }
  }
}

template <int Rows>
void product_rows(int vectors, int64_t depth, const Operand* a, int64_t a_stride, const Operand* b, float* c,
                  int64_t c_stride, bool accumulate) {
  switch (vectors) {
    case 1:
      return product_block<Rows, 1>(depth, a, a_stride, b, c, c_stride, accumulate);
    case 2:
      return product_block<Rows, 2>(depth, a, a_stride, b, c, c_stride, accumulate);
#if defined(__AVX512F__)
    case 3:
      return product_block<Rows, 3>(depth, a, a_stride, b, c, c_stride, accumulate);
    case 4:
      return product_block<Rows, 4>(depth, a, a_stride, b, c, c_stride, accumulate);
#endif
  }
}

// Rows of tokens that are needed later. Products are long on arithmetic and short on memory traffic, so they ask for
// them on the way: a burst of requests would be dropped.
struct Ahead {
  struct Rows {
    const void* base;  // null: none
    const int64_t* tokens;
    int64_t count;
    bool written;
  };
  Rows lists[3];
  int64_t row_bytes;
};

// Inlined by force: a function that only prefetches counts as free of effects, and its calls are dropped.
[[gnu::always_inline]] inline void ask(const Ahead& ahead, int64_t row) {
  for (const Ahead::Rows& rows : ahead.lists) {
    if (rows.base == nullptr || row >= rows.count) continue;
    const char* from = static_cast<const char*>(rows.base) + rows.tokens[row] * ahead.row_bytes;
    if (rows.written) {
      for (int64_t i = 0; i < ahead.row_bytes; i += 64) __builtin_prefetch(from + i, 1, 2);
    } else {
      for (int64_t i = 0; i < ahead.row_bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    }
  }
}

// `b` holds the panels of a matrix of `panel_rows` rows, of which the first k are used. Columns of C from n to
// padded(n) are written too. Where k is odd, one more operand a row is read, and has to be finite in A and zero in B or
// the reverse.
void product(int64_t m, int64_t n, int64_t k, const Operand* a, int64_t a_stride, const Operand* b, int64_t panel_rows,
             float* c, int64_t c_stride, bool accumulate, const Ahead* ahead = nullptr) {
  const int64_t columns = padded(n);
  const int64_t blocks = parts(columns, kPanel) * parts(k, kDepth) * parts(m, kRowsAtOnce);
  const int64_t share = ahead == nullptr ? 0 : parts(kTileRows, blocks);
  int64_t asked = 0;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const int64_t width = columns - column < kPanel ? columns - column : kPanel;
    const int vectors = static_cast<int>(width / kLanes);
    const Operand* panel = b + column * even(panel_rows);
    for (int64_t start = 0; start < k; start += kDepth) {
      const int64_t depth = k - start < kDepth ? k - start : kDepth;
      const bool add = accumulate || start > 0;
      for (int64_t row = 0; row < m; row += kRowsAtOnce) {
        const Operand* left = a + row * a_stride + start;
        const Operand* right = panel + start * kPanel;
        float* to = c + row * c_stride + column;
        for (const int64_t stop = asked + share; asked < stop; ++asked) ask(*ahead, asked);
        switch (m - row) {
          case 1:
            product_rows<1>(vectors, depth, left, a_stride, right, to, c_stride, add);
            break;
          case 2:
            product_rows<2>(vectors, depth, left, a_stride, right, to, c_stride, add);
            break;
          case 3:
            product_rows<3>(vectors, depth, left, a_stride, right, to, c_stride, add);
            break;
          case 4:
            product_rows<4>(vectors, depth, left, a_stride, right, to, c_stride, add);
            break;
          case 5:
            product_rows<5>(vectors, depth, left, a_stride, right, to, c_stride, add);
            break;
          default:
            product_rows<kRowsAtOnce>(vectors, depth, left, a_stride, right, to, c_stride, add);
        }
      }
    }
  }
}

#if defined(MOSA_BF16_PRODUCTS)
// kLanes columns of rows `row` and `row` + 1 of B, interleaved; `to` is where panel_index puts the first of them.
inline void set_panel_vectors(Operand* to, Vector even_row, Vector odd_row) {
  const Bits low = __builtin_convertvector(to_bfloat16(even_row), Bits);
  const Bits high = __builtin_convertvector(to_bfloat16(odd_row), Bits);
  const Bits pairs = low | (high << 16);
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}
#else
inline void set_panel_vectors(Operand* to, Vector even_row, Vector odd_row) {
  store(to, even_row);
  store(to + kPanel, odd_row);
}
#endif

// Panels of B [k, n] from its rows, which are padded with zeros to `stride` >= padded(n).
void pack_panels(const float* rows, int64_t stride, int64_t k, int64_t n, Operand* to) {
  for (int64_t row = 0; row < k; row += 2) {
    const float* from = rows + row * stride;
    for (int64_t column = 0; column < padded(n); column += kLanes) {
      const Vector odd_row = row + 1 < k ? load(from + stride + column) : Vector{};
      set_panel_vectors(to + panel_index(k, row, column), load(from + column), odd_row);
    }
  }
}

// The first words of a row: kLanes of fp32, or as many pairs of bf16, of which the second half may lie behind its end.
inline Bits load_words(const float* from, bool second_half) {
#if defined(MOSA_BF16_PRODUCTS)
  const Vector upper = second_half ? load(from + kLanes) : Vector{};
  return bit_cast<Bits>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(upper), bit_cast<__m512>(load(from))));
#else
  (void)second_half;
  return bit_cast<Bits>(load(from));
#endif
}

// Panels of B [k, n] from the rows of its transpose [n, k], which are padded with zeros to `stride` >= padded(k).
void pack_panels_transposed(const float* rows, int64_t stride, int64_t k, int64_t n, Operand* to) {
  for (int64_t column = 0; column < padded(n); column += kLanes) {
    for (int64_t row = 0; row < k; row += kLanes * kPair) {
      Bits words[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool given = column + i < n;
        words[i] = given ? load_words(rows + (column + i) * stride + row, row + kLanes < stride) : Bits{};
      }
      transpose(words);
      for (int i = 0; i < kLanes && row + i * kPair < even(k); ++i) {
        __builtin_memcpy(to + panel_index(k, row + i * kPair, column), &words[i], sizeof(words[i]));
      }
    }
  }
}

// to [columns, rows] = from [rows, columns].T, both in whole blocks of kPad x kPad.
void transpose_blocks(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                      int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Bits block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = bit_cast<Bits>(load(from + (row + i) * from_stride + column));
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (column + i) * to_stride + row, bit_cast<Vector>(block[i]));
    }
  }
}

}  // namespace
}  // namespace mosa
