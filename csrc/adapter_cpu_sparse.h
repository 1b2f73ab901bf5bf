// Products with what one expert owns, for pairs of bf16.
//
// An expert owns entries at random, so no block of its matrix is empty, but every column is short. The rows of B go in
// chunks, and of each chunk a column lists the rows it owns, in slots. The operands of a chunk fill one register, from
// which one permutation fetches what 16 columns multiply in a slot. Cycles of a product, of one with a permutation of
// one register, and of one with a permutation of two: 1.03, 1.53, 2.28 (Zen 4).
#pragma once

#include "adapter_cpu_product.h"

#if defined(MOSA_BF16_PRODUCTS)

namespace mosa {
namespace {

static_assert(kLanes == kPad, "a group of columns is a vector");

constexpr int64_t kChunk = 32;    // rows of B, bf16
constexpr int kPairChunk = kPad;  // rows of B, pairs of bf16
constexpr int64_t kSlotCost = 2;  // of a slot, in dense products; with less of a gain slots are not worth packing
constexpr int kSparseRows = 8;    // 8 sums and 8 registers of operands

constexpr int64_t kPairElements = 4 * kLanes;  // of a pair of slots: two rows and two weights of each column

constexpr int64_t whole_lines(int64_t bytes) { return parts(bytes, 64) * 64; }

// Where the slots of a [k, n] matrix stand in its memory.
struct Slots {
  int32_t* starts;  // [groups * chunks + 1] of the pairs of slots of a group of 16 columns and a chunk
  Operand* pairs;   // [pairs, 2, 16, 2] rows within the chunk, then their weights
  int64_t chunks;
  Slots(void* memory, int64_t k, int64_t n) : starts(static_cast<int32_t*>(memory)), pairs(), chunks(parts(k, kChunk)) {
    pairs = reinterpret_cast<Operand*>(static_cast<char*>(memory) + whole_lines((padded(n) / kLanes * chunks + 1) * 4));
  }
};

// What Slots take beyond the panels of the same matrix; they are made only where their pairs take no more than panels.
size_t slots_bytes_beyond(int64_t k, int64_t n) {
  const Slots at(nullptr, k, n);
  return reinterpret_cast<size_t>(at.pairs);
}

inline uint32_t lanes_of(int64_t given) { return given >= 16 ? 0xffffu : (1u << given) - 1u; }
inline int larger(int a, int b) { return a > b ? a : b; }
inline __m512i lane_numbers() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

// 16 rows of each of 16 columns of B [k, n], a column in each vector, from B's rows or (transposed) those of its
// transpose, either padded with zeros. What lies outside B reads as zero.
inline void load_columns(const float* rows, int64_t stride, int64_t k, int64_t n, bool transposed, int64_t row,
                         int64_t column, Bits (&columns)[kLanes]) {
  const int64_t first = transposed ? column : row, height = transposed ? n : k;
  const float* from = rows + first * stride + (transposed ? row : column);
  const int64_t given = row < k ? height - first : 0;
  for (int i = 0; i < kLanes; ++i) columns[i] = i < given ? bit_cast<Bits>(load(from + i * stride)) : Bits{};
  if (!transposed) transpose(columns);
}

// What the columns of one group own of one chunk, in words of a weight and, in the upper half, its row: those that a
// column owns, in order, then zeros. Returns how many the longest column has.
inline int list_words(const float* rows, int64_t stride, int64_t k, int64_t n, bool transposed, int64_t chunk,
                      int64_t group, uint32_t (&listed)[kLanes][kChunk + kLanes]) {
  int counts[kLanes] = {}, most = 0;
  for (int lane = 0; lane < kLanes; ++lane) __builtin_memset(listed[lane] + kLanes, 0, kLanes * sizeof(uint32_t));
  for (int half = 0; half < 2; ++half) {
    Bits columns[kLanes];
    load_columns(rows, stride, k, n, transposed, chunk * kChunk + half * kLanes, group * kLanes, columns);
    const __m512i numbers = _mm512_slli_epi32(_mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(half * kLanes)), 16);
    for (int lane = 0; lane < kLanes; ++lane) {
      const __m512 values = bit_cast<__m512>(columns[lane]);
      const __mmask16 owned = _mm512_cmp_ps_mask(values, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      const __m512i weights = _mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(values)));
      // In a register: straight to memory it takes Zen 4 a hundred cycles.
      const __m512i words = _mm512_maskz_compress_epi32(owned, _mm512_or_si512(weights, numbers));
      _mm512_storeu_si512(listed[lane] + counts[lane], words);
      counts[lane] += __builtin_popcount(owned);
      most = larger(most, counts[lane]);
    }
  }
  return most;
}

// Slots of B [k, n], from its rows or (transposed) those of its transpose. False, with nothing useful in memory, where
// dense products are faster.
bool pack_slots(const float* rows, int64_t stride, int64_t k, int64_t n, bool transposed, void* memory) {
  const Slots slots(memory, k, n);
  const int64_t groups = padded(n) / kLanes, limit = groups * even(k) / 2 / kSlotCost;
  int32_t* starts = slots.starts;
  int32_t total = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t chunk = 0; chunk < slots.chunks; ++chunk) {
      uint32_t listed[kLanes][kChunk + kLanes];
      const int most = list_words(rows, stride, k, n, transposed, chunk, group, listed);
      Operand* pair = slots.pairs + total * kPairElements;
      *starts++ = total;
      total += (most + 1) / 2;
      if (total > limit) return false;
      for (int first = 0; first < most; first += kLanes) {
        Bits words[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) __builtin_memcpy(&words[lane], listed[lane] + first, sizeof(Bits));
        transpose(words);
        for (int slot = 0; slot < kLanes && first + slot < most; slot += 2, pair += kPairElements) {
          const Bits even_slot = words[slot], odd_slot = words[slot + 1];
          const Bits both[2] = {(even_slot >> 16) | (odd_slot & 0xffff0000u), (even_slot & 0xffffu) | (odd_slot << 16)};
          __builtin_memcpy(pair, both, sizeof(both));
        }
      }
    }
  }
  *starts = total;
  return true;
}

// Of a chunk's operands, those that exist; the others read as zero.
inline __m512i load_operands(const Operand* from, int64_t given) {
  const uint32_t mask = given >= 32 ? ~0u : (1u << given) - 1u;
  return _mm512_maskz_loadu_epi16(mask, from);
}

template <int Rows>
void sparse_rows(const Slots& slots, int64_t groups, int64_t k, const Operand* a, int64_t a_stride, float* c,
                 int64_t c_stride) {
  const int32_t* starts = slots.starts;
  const Operand* pair = slots.pairs;
  for (int64_t group = 0; group < groups; ++group) {
    __m512 sums[Rows];
    for (int i = 0; i < Rows; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t chunk = 0; chunk < slots.chunks; ++chunk, ++starts) {
      __m512i operands[Rows];
      for (int i = 0; i < Rows; ++i) {
        operands[i] = load_operands(a + i * a_stride + chunk * kChunk, k - chunk * kChunk);
      }
      for (int32_t left = starts[1] - starts[0]; left > 0; --left, pair += kPairElements) {
        const __m512i rows = _mm512_loadu_si512(pair);
        const __m512i weights = _mm512_loadu_si512(pair + 2 * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) {
          const __m512i found = _mm512_permutexvar_epi16(rows, operands[i]);
          sums[i] = _mm512_dpbf16_ps(sums[i], bit_cast<__m512bh>(found), bit_cast<__m512bh>(weights));
        }
      }
    }
    for (int i = 0; i < Rows; ++i) _mm512_storeu_ps(c + i * c_stride + group * kLanes, sums[i]);
  }
}

typedef void (*SparseRows)(const Slots&, int64_t, int64_t, const Operand*, int64_t, float*, int64_t);
constexpr SparseRows kSparse[kSparseRows] = {sparse_rows<1>, sparse_rows<2>, sparse_rows<3>, sparse_rows<4>,
                                             sparse_rows<5>, sparse_rows<6>, sparse_rows<7>, sparse_rows<8>};

// C[m, n] = A[m, k] B[k, n]; columns from n to padded(n) become zero.
void sparse_product(int64_t m, int64_t n, int64_t k, const Operand* a, int64_t a_stride, const void* memory, float* c,
                    int64_t c_stride) {
  const Slots slots(const_cast<void*>(memory), k, n);
  for (int64_t row = 0; row < m; row += kSparseRows) {
    const int64_t rows = m - row < kSparseRows ? m - row : kSparseRows;
    kSparse[rows - 1](slots, padded(n) / kLanes, k, a + row * a_stride, a_stride, c + row * c_stride, c_stride);
  }
}

size_t owned_bytes(int64_t width, int64_t rank) {
  const int64_t groups = padded(width) / kLanes;
  return static_cast<size_t>(whole_lines((groups * parts(rank, kPairChunk) + 1) * 4) +
                             groups * padded(rank) / kSlotCost * 64);
}

// Which of a chunk's units an expert owns in a column.
inline __mmask16 owned_units(const CpuOwner& owner, int64_t column, int64_t chunk) {
  const int64_t given = column < owner.width ? owner.rank - chunk * kPairChunk : 0;
  const __mmask16 here = static_cast<__mmask16>(lanes_of(given));
  const __m128i owners = _mm_maskz_loadu_epi8(here, owner.assignment + column * owner.rank + chunk * kPairChunk);
  return _mm_mask_cmpeq_epi8_mask(here, owners, _mm_set1_epi8(static_cast<char>(owner.id)));
}

bool pack_owned(const CpuOwner& owner, void* memory, CpuOwned* owned) {
  const int64_t groups = padded(owner.width) / kLanes, chunks = parts(owner.rank, kPairChunk);
  const int64_t limit = groups * padded(owner.rank) / kSlotCost;
  int32_t* starts = static_cast<int32_t*>(memory);
  int32_t* units = reinterpret_cast<int32_t*>(static_cast<char*>(memory) + whole_lines((groups * chunks + 1) * 4));
  *owned = {starts, units, chunks};
  int32_t total = 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const __m512i numbers = _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int>(chunk) * kPairChunk));
      Bits listed[kLanes];
      int most = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const __mmask16 owns = owned_units(owner, group * kLanes + lane, chunk);
        listed[lane] = bit_cast<Bits>(_mm512_mask_compress_epi32(_mm512_set1_epi32(-1), owns, numbers));
        most = larger(most, __builtin_popcount(owns));
      }
      *starts++ = total;
      if (total + most > limit) {
        *owned = {};
        return false;
      }
      transpose(listed);
      for (int slot = 0; slot < most; ++slot, ++total) {
        __builtin_memcpy(units + total * kLanes, &listed[slot], sizeof(Bits));
      }
    }
  }
  *starts = total;
  return true;
}

void spread_owned(const CpuOwner& owner, const CpuOwned& owned, int64_t group, int64_t first, int64_t last,
                  const float* sums, float* to, int64_t to_stride) {
  const int32_t* starts = owned.starts + group * owned.chunks;
  for (int64_t chunk = first; chunk < last; ++chunk, to += kPairChunk) {
    const int32_t slots = starts[chunk + 1] - starts[chunk];
    Bits values[kLanes];
    for (int i = 0; i < kLanes; ++i) values[i] = i < slots ? bit_cast<Bits>(load(sums + i * kLanes)) : Bits{};
    sums += slots * kLanes;
    transpose(values);
    for (int lane = 0; lane < kLanes; ++lane) {
      const __mmask16 owns = owned_units(owner, group * kLanes + lane, chunk);
      _mm512_storeu_ps(to + lane * to_stride, _mm512_maskz_expand_ps(owns, bit_cast<__m512>(values[lane])));
    }
  }
}

// Adds to, or sets, the sums of Count slots over the pairs of rows of a tile.
template <int Count>
void sum_slots(int64_t pairs, const Operand* left, int64_t left_stride, const Operand* right, const int32_t* units,
               float* sums, bool accumulate) {
  __m512 slots[Count];
  __m512i chosen[Count];
  for (int i = 0; i < Count; ++i) {
    slots[i] = accumulate ? _mm512_loadu_ps(sums + i * kLanes) : _mm512_setzero_ps();
    chosen[i] = _mm512_loadu_si512(units + i * kLanes);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512i operands = _mm512_loadu_si512(left + pair * left_stride);
    const __m512bh gradient = bit_cast<__m512bh>(_mm512_loadu_si512(right + pair * 2 * kPanel));
#pragma GCC unroll 12
    for (int i = 0; i < Count; ++i) {
      const __m512i found = _mm512_permutexvar_epi32(chosen[i], operands);
      slots[i] = _mm512_dpbf16_ps(slots[i], bit_cast<__m512bh>(found), gradient);
    }
  }
  for (int i = 0; i < Count; ++i) _mm512_storeu_ps(sums + i * kLanes, slots[i]);
}

typedef void (*SumSlots)(int64_t, const Operand*, int64_t, const Operand*, const int32_t*, float*, bool);
constexpr int kMostSlots = 12;  // in registers, with the units of each
constexpr SumSlots kSumSlots[kMostSlots] = {sum_slots<1>, sum_slots<2>,  sum_slots<3>,  sum_slots<4>,
                                            sum_slots<5>, sum_slots<6>,  sum_slots<7>,  sum_slots<8>,
                                            sum_slots<9>, sum_slots<10>, sum_slots<11>, sum_slots<12>};

// The owned entries of left.T @ right, over n rows that stand in pairs: left [n / 2, padded(rank), 2], right as panels
// of [kTileRows, width].
void owned_product(int64_t n, int64_t width, int64_t rank, const Operand* left, const Operand* right,
                   const CpuOwned& owned, float* sums, bool accumulate) {
  for (int64_t group = 0; group < padded(width) / kLanes; ++group) {
    const Operand* columns = right + panel_index(kTileRows, 0, group * kLanes);
    for (int64_t chunk = 0; chunk < owned.chunks; ++chunk) {
      const int32_t* starts = owned.starts + group * owned.chunks + chunk;
      for (int32_t slot = starts[0]; slot < starts[1]; slot += kMostSlots) {
        const int32_t count = starts[1] - slot < kMostSlots ? starts[1] - slot : kMostSlots;
        kSumSlots[count - 1]((n + 1) / 2, left + chunk * 2 * kPairChunk, 2 * padded(rank), columns,
                             owned.units + slot * kLanes, sums + slot * kLanes, accumulate);
      }
    }
  }
}

}  // namespace
}  // namespace mosa

#endif
