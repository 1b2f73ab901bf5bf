// Tiles of x, dout and the two projections on their way from global into shared memory.
//
// A block works in steps of kColumns columns. `begin` starts the loads of a step, before the products of the step
// before it; `finish` puts the tile into shared memory, after them.
#pragma once

#include <cstdint>

#include "adapter_math.h"
#include "adapter_memory.h"
#include "adapter_owned.h"
#include "adapter_plain.h"
#include "adapter_units.h"

namespace mosa {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// This thread's number, read anew at every call: the compiler would otherwise keep what one phase of a kernel derives
// from it in registers through the others. Of the bf16 forward kernel on sm_90, 48 bytes in place of 112 are spilled at
// r = 64 so, and 112 in place of 192 at r = 256.
__device__ inline int thread_of_block() {
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

constexpr int larger(int a, int b) { return a > b ? a : b; }

// Elements between the rows of a tile of this many columns: 16 bytes more, so that eight rows lie in different banks.
template <typename E>
constexpr int padded_row(int columns) {
  return columns + kWideBytes / static_cast<int>(sizeof(E));
}

// Sums over 2, 4, 8 or so neighbouring lanes, in every one of them.
template <int kLanes>
__device__ inline float sum_lanes(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The smallest value of a warp, in every lane.
__device__ inline int least_of_lanes(int value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = min(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// How the vectors of a tile are spread over the threads of a block: kCount each, in rows `kRowStep` apart.
template <int kRows, int kColumns>
struct Spread {
  static constexpr int kPerRow = kColumns / kVector;
  static constexpr int kVectors = kRows * kPerRow;
  static constexpr int kCount = (kVectors + kThreads - 1) / kThreads;
  static constexpr int kRowStep = kThreads / kPerRow;
  static_assert(kVectors % kWarp == 0, "whole warps take part");
  static_assert(kThreads % kPerRow == 0, "a thread stays in its columns");

  const int thread = thread_of_block();

  __device__ bool has(int j) const { return kVectors % kThreads == 0 || j * kThreads + thread < kVectors; }
  __device__ int row(int j) const { return j * kRowStep + thread / kPerRow; }
  __device__ int column() const { return thread % kPerRow * kVector; }
};

// Rows of x or dout. Where they already are what the product takes (`direct`), they are copied asynchronously.
template <typename E, int kRows, int kColumns>
struct RowTile : Spread<kRows, kColumns> {
  using S = Spread<kRows, kColumns>;
  static constexpr int kRow = padded_row<E>(kColumns);
  static constexpr int kSize = kRows * kRow;
  Raw raw[S::kCount];

  // Row i of the tile is row `first + i` of the tensor, zeros where not take(i), of which left(at) elements are there
  // from column `at` on.
  template <typename Tensor, typename Take, typename Left>
  __device__ void begin(const Tensor& from, bool direct, int64_t first, const Take& take, int column, const Left& left,
                        E* tile) {
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int row = this->row(j);
      const int at = column + this->column();
      const int count = take(row) ? left(at) : 0;
      if (direct) {
        const E* source = static_cast<const E*>(from.data);
        start_copy(tile + row * kRow + this->column(), count > 0 ? source + (first + row) * from.stride + at : source,
                   count);
      } else {
        raw[j] = load_raw(from.data, from.dtype, from.wide, (first + row) * from.stride + at, count);
      }
    }
    if (direct) commit_copies();
  }

  // Calls change(j, row, value) on every vector of this thread, in float32, and puts it into the tile. A direct tile
  // has arrived by then, for the thread that copied it, and stays as it is; `look` says whether it is looked at.
  template <typename Tensor, typename Change>
  __device__ void finish(const Tensor& from, bool direct, bool look, E* tile, const Change& change) {
    if (direct) wait_for_copies();
    if (direct && !look) return;
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      E* to = tile + this->row(j) * kRow + this->column();
      float value[kVector];
      if (direct) {
        get_vector(to, value);
      } else {
        unpack(raw[j], from.dtype, value);
      }
      change(j, this->row(j), value);
      if (!direct) put_vector(to, value);
    }
  }

  // The vector itself before `finish`: what a direct tile needs to have arrived for.
  template <typename Tensor>
  __device__ void peek(const Tensor& from, bool direct, const E* tile, int j, float (&value)[kVector]) const {
    if (direct) {
      get_vector(tile + this->row(j) * kRow + this->column(), value);
    } else {
      unpack(raw[j], from.dtype, value);
    }
  }
};

// Wg = gamma o w_down_e, [kRank, kColumns] with a unit in each row; zeros beyond r and d.
template <typename E, int kRank, int kColumns, bool kListed = false>
struct DownTile : Spread<kRank, kColumns> {
  using S = Spread<kRank, kColumns>;
  static constexpr int kRow = padded_row<E>(kColumns);
  static constexpr int kSize = kRank * kRow;
  EarlyVector<E> early[S::kCount];
  float sums[S::kCount];    // of the rows of the rounded Wg, over this thread's columns
  float biases[S::kCount];  // w_down_e beta, likewise
  RowUnits<kListed, S::kCount> units;

  __device__ void clear() {
    for (int j = 0; j < S::kCount; ++j) sums[j] = biases[j] = 0.0f;
  }
  // Before the first step of an expert's tiles.
  __device__ void open(const AdapterParams& p, int e) {
    clear();
    units.find(*this, UnitsOf<kListed>(p, e));
  }

  __device__ static int index_of(const AdapterParams& p, int unit, int at) { return unit * p.width + at; }
  template <typename Params>
  __device__ static int count_of(const Params& p, int unit, int at) {
    return unit < p.rank ? columns_from(p, at) : 0;
  }

  template <typename Params>
  __device__ void begin(const Params& p, int column) {
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int unit = units.of(j, this->row(j));
      const int at = column + this->column();
      early[j].begin(p.w_down, index_of(p, unit, at), count_of(p, unit, at));
    }
  }

  template <typename Params>
  __device__ void finish(const Params& p, int column, int e, E* tile) {
    const int at = column + this->column();
    // Both are on their way before one is waited for, which takes fewer registers too: on sm_80 the bf16 backward
    // kernel over tokens spills 364 bytes so in place of 468 at r = 64, and 320 in place of 576 at r = 128.
    const auto whole = [&](const auto& from, bool given) {
      return load_raw(from.data, from.dtype, from.wide, at, given ? columns_from(p, at) : 0);
    };
    const Raw raw_gamma = whole(p.gamma, has_norm(p));
    const Raw raw_beta = whole(p.beta, has_beta(p));
    float gamma[kVector];
    float beta[kVector];
    unpack(raw_gamma, p.gamma.dtype, gamma);
    unpack(raw_beta, p.beta.dtype, beta);
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int unit = units.of(j, this->row(j));
      float value[kVector];
      early[j].finish(p.w_down, index_of(p, unit, at), count_of(p, unit, at), value);
      if (p.assignment_down != nullptr) see(p, e, unit, at, value);
      if (has_beta(p)) {
        for (int i = 0; i < kVector; ++i) biases[j] += value[i] * beta[i];
      }
      if (has_norm(p)) {
        for (int i = 0; i < kVector; ++i) value[i] *= gamma[i];
      }
      put_rounded(tile + this->row(j) * kRow + this->column(), value);
      for (int i = 0; i < kVector; ++i) sums[j] += value[i];
    }
  }

  // What expert e sees of a row of a sparse down-projection: its own entries, and the initial ones elsewhere (Eq. 2).
  __device__ static void see(const AdapterParams& p, int e, int unit, int at, float (&value)[kVector]) {
    const int count = count_of(p, unit, at);
    const int index = index_of(p, unit, at);
    float initial[kVector];
    load_vector(p.w_down_init, index, count, initial);
    const Owners owners = load_owners(p.assignment_down, p.wide_assignment_down, index, count);
    const float factor = factor_of(p, e);
    for (int i = 0; i < kVector; ++i) {
      const float gain = e < 0 || owners.of(i) == e ? factor : 0.0f;
      value[i] = gain == 1.0f ? value[i] : initial[i] + gain * (value[i] - initial[i]);
    }
  }

  // Row sums s, and [b_down] + w_down_e beta, [kRank] each, into shared memory; 0 beyond r.
  __device__ void store_sums(const AdapterParams& p, float* s, float* bias, bool add_b_down = true) {
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int unit = units.of(j, this->row(j));
      const float total = sum_lanes<S::kPerRow>(sums[j]);
      float at_zero = sum_lanes<S::kPerRow>(biases[j]);
      if (this->column() != 0) continue;
      if (add_b_down && p.b_down.data != nullptr && unit < p.rank) at_zero += load_number(p.b_down, unit);
      s[this->row(j)] = total;
      bias[this->row(j)] = at_zero;
    }
  }
};

// w_up_e without its factor, [kColumns, kRank] with a column of x in each row; zeros beyond d and r.
template <typename E, int kRank, int kColumns, bool kListed = false>
struct UpTile : Spread<kColumns, kRank> {
  using S = Spread<kColumns, kRank>;
  static constexpr int kRow = padded_row<E>(kRank);
  static constexpr int kSize = kColumns * kRow;
  EarlyVector<E> early[S::kCount];
  Owners owners[S::kCount];
  VectorUnits<kListed> units;

  __device__ void open(const AdapterParams& p, int e) { units.find(UnitsOf<kListed>(p, e), this->column()); }
  template <typename Params>
  __device__ int limit(const Params& p, int at) const {
    return kIsPlain<Params> || at < p.width ? units.limit(p, this->column()) : 0;
  }

  template <typename Params>
  __device__ void begin(const Params& p, int column) {
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int at = column + this->row(j);
      early[j].begin(p.w_up, units, at * p.rank, this->column(), limit(p, at));
      if (p.assignment != nullptr) {
        owners[j] = units.load(p.assignment, p.wide_assignment, at * p.rank, this->column(), limit(p, at));
      }
    }
  }

  template <typename Params>
  __device__ void finish(const Params& p, int column, int e, E* tile) {
    const bool masked = p.assignment != nullptr && e >= 0;
#pragma unroll
    for (int j = 0; j < S::kCount; ++j) {
      if (!this->has(j)) continue;
      const int at = column + this->row(j);
      E* to = tile + this->row(j) * kRow + this->column();
      if (p.w_up.dtype == Element<E>::kDType && sizeof(E) != sizeof(float)) {  // as it lies in memory
        Wide bits;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          bits.word[i] = early[j].raw.word[i];
          if (masked) bits.word[i] &= owners[j].pair_of(i, e);
        }
        *reinterpret_cast<Wide*>(to) = bits;
        continue;
      }
      float value[kVector];
      early[j].finish(p.w_up, units, at * p.rank, this->column(), limit(p, at), value);
      if (masked) {
        for (int i = 0; i < kVector; ++i) value[i] = owners[j].of(i) == e ? value[i] : 0.0f;
      }
      put_vector(to, value);
    }
  }
};

// The up-projection's bias for expert e in one column: its row, or the mean of all for the merged adapter.
__device__ inline float up_bias(const AdapterParams& p, int e, int column) {
  if (p.b_up.data == nullptr || column >= p.width) return 0.0f;
  if (p.bias_rows == 0) return load_number(p.b_up, column);
  if (e >= 0) {
    return e < p.bias_rows ? load_number(p.b_up, static_cast<int64_t>(e) * p.width + column) : 0.0f;
  }
  float sum = 0.0f;
  for (int n = 0; n < p.bias_rows; ++n) sum += load_number(p.b_up, static_cast<int64_t>(n) * p.width + column);
  return sum / static_cast<float>(p.bias_rows);
}

// How a warp shares the tiles of a product of kRows x kColumns with the other warps of the block.
template <int kRows, int kColumns>
struct WarpTiles {
  static constexpr int kRowTiles = kRows / kUnit;
  static constexpr int kGroups = kWarps / kRowTiles;  // warps that share a row of tiles
  static constexpr int kColumnTiles = kColumns / kUnit;
  static constexpr int kTiles = kColumnTiles > kGroups ? kColumnTiles / kGroups : 1;
  static_assert(kWarps % kRowTiles == 0, "every warp has one row of tiles");
  static_assert(kColumnTiles % kTiles == 0, "every warp has as many tiles");

  const int warp = thread_of_block() / kWarp;

  __device__ int row() const { return warp % kRowTiles * kUnit; }
  __device__ int group() const { return warp / kRowTiles; }
  __device__ int column() const { return group() * kTiles * kUnit; }
  __device__ bool busy() const { return column() < kColumns; }
};

// A warp's own shared memory, through which its accumulators become vectors of eight neighbouring columns.
template <int kTiles>
struct Patch {
  static constexpr int kWidth = kTiles * kUnit;
  static constexpr int kRow = kWidth + 4;
  static constexpr int kSize = kUnit * kRow;
  static constexpr int kPerRow = kWidth / kVector;
  static constexpr int kCount = kTiles;  // vectors of a lane

  float* const memory;
  const int lane = thread_of_block() % kWarp;

  __device__ explicit Patch(float* own) : memory(own) {}
  __device__ int row(int i) const { return (lane + i * kWarp) / kPerRow; }
  __device__ int column(int i) const { return (lane + i * kWarp) % kPerRow * kVector; }

  // value[i] becomes the vector at row(i), column(i) of the tiles from `first` on.
  template <typename Accumulators>
  __device__ void spread(const Accumulators& from, int first, float (&value)[kCount][kVector]) const {
    __syncwarp();  // what was there has been read
    for (int j = 0; j < kTiles; ++j) from.store(first + j, memory + j * kUnit, kRow);
    __syncwarp();
    for (int i = 0; i < kCount; ++i) get_vector(memory + row(i) * kRow + column(i), value[i]);
  }
};

}  // namespace mosa
