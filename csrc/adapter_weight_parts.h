// What a block of the backward pass finds of the weight gradients, and where its part of them goes.
#pragma once

#include <cstdint>

#include "adapter_backward_tokens_kernel.h"

namespace mosa {

constexpr int kWholeRank = 128;  // units of one row of tiles for each warp

constexpr int weight_columns(int padded_rank) { return padded_rank <= 64 ? 128 : padded_rank == 128 ? 64 : 32; }
template <typename E>
constexpr int weight_tokens(int padded_rank) {
  return sizeof(E) == sizeof(float) && padded_rank == 256 ? 16 : 32;
}

template <typename E, int kRank>
struct WeightsShared {
  static constexpr int kColumns = weight_columns(kRank);
  static constexpr int kTokens = weight_tokens<E>(kRank);
  static constexpr int kBatches = kRank > kWholeRank ? kRank / kWholeRank : 1;
  static constexpr int kBatchRows = kRank / kBatches;
  static constexpr int kUnitTiles = kRank / kUnit;
  using Left = RowTile<E, kTokens, kRank>;      // h or da
  using Right = RowTile<E, kTokens, kColumns>;  // dout or xhat
  using Warp = WarpTiles<kBatchRows, kColumns>;
  static constexpr int kPatchTiles = Warp::kTiles > 1 ? 2 : 1;
  using P = Patch<kPatchTiles>;

  struct Operands {
    alignas(128) E left[2][Left::kSize];
    alignas(128) E right[2][Right::kSize];
  };
  struct Results {
    alignas(128) float patch[kWarps][P::kSize];
    float gamma[kUnitTiles][kColumns];  // each row of tiles has its units' share
    float beta[kUnitTiles][kColumns];
  };
  union {
    Operands operands;
    Results results;
  };
  float shares[kThreads];               // while tokens are summed, a thread's own excess
  float sums[larger(kRank, kColumns)];  // over the tokens: of da for the down-, of dout for the up-projection
};

// A block's part of the work.
struct WeightWork {
  bool up;
  bool varied;  // whether the masks of several experts matter
  int begin;    // tokens
  int end;
  int column;
  float* part;
  AdapterTensor left;
};

// Adds a number to a sum and keeps what rounding makes of it (Kahan): eager PyTorch's sums of many tokens are taken in
// stages, and one chain of additions is up to four times further off (float32, 4,000 to 12,608 tokens, 132
// multiprocessors).
__device__ inline void add_exactly(float added, float& sum, float& excess) {
  const float change = added - excess;
  const float after = sum + change;
  excess = (after - sum) - change;
  sum = after;
}

// The sum over the rows of a tile of one of its first kSummed columns, of which threads kSummed apart have a share. A
// loop from a thread's own row on would not be unrolled: 11 instructions a row in place of 3.
template <int kSummed, typename Tile, int kRows, typename E>
__device__ inline float share_of_column(const E* tile) {
  constexpr int kStep = kThreads / kSummed;
  static_assert(kRows % kStep == 0, "every thread has as many rows");
  const E* const own = tile + thread_of_block() / kSummed * Tile::kRow + thread_of_block() % kSummed;
  float sum = 0.0f;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) sum += to_float(own[row * Tile::kRow]);
  return sum;
}

// shared.sums[i] = what threads i, i + summed, ... have found of column i. Ends with a barrier.
template <typename E, int kRank>
__device__ inline void add_up_columns(float share, int summed, WeightsShared<E, kRank>& shared) {
  const int thread = thread_of_block();
  shared.shares[thread] = share;
  __syncthreads();
  if (thread < summed) {
    float total = 0.0f;
    for (int i = thread; i < kThreads; i += summed) total += shared.shares[i];
    shared.sums[thread] = total;
  }
  __syncthreads();
}

// Puts a vector of a gradient into the block's part, or adds it to what an expert before has put there.
__device__ inline void put_part(float* part, int width, int64_t index, int count, bool add,
                                const float (&value)[kVector]) {
  const bool wide = width % 4 == 0;
  float result[kVector];
  for (int i = 0; i < kVector; ++i) result[i] = value[i];
  if (add) {
    float before[kVector];
    unpack(load_raw(part, kFloat32, wide, index, count), kFloat32, before);
    for (int i = 0; i < kVector; ++i) result[i] += before[i];
  }
  store_vector(part, kFloat32, wide, index, count, result);
}

__device__ inline void put_part(float* part, int64_t index, bool add, float value) {
  part[index] = add ? part[index] + value : value;
}

// The sum over the rows of a patch's tile, in the first lanes of each column.
template <typename P>
__device__ inline void sum_rows(float (&value)[kVector]) {
#pragma unroll
  for (int offset = kWarp / 2; offset >= P::kPerRow; offset /= 2) {
    for (int n = 0; n < kVector; ++n) value[n] += __shfl_xor_sync(0xffffffffu, value[n], offset);
  }
}

// The gradients of w_down, b_down, gamma and beta from the tokens of expert e.
template <bool kListed = false, typename E, int kRank, typename Accumulators>
__device__ inline void put_down(const AdapterParams& p, const AdapterParts& parts, const WeightWork& work, int e,
                                bool add, WeightsShared<E, kRank>& shared, const Accumulators* products) {
  using W = WeightsShared<E, kRank>;
  using P = typename W::P;
  using Down = DownTile<E, kRank, W::kColumns>;
  const bool norm = p.gamma.data != nullptr;
  const float factor = factor_of(p, e);
  const typename W::Warp warp;
  const P patch(shared.results.patch[warp.warp]);
  const UnitsOf<kListed> units(p, e);
#pragma unroll
  for (int batch = 0; batch < W::kBatches; ++batch) {
#pragma unroll
    for (int tile = 0; tile < W::Warp::kTiles; tile += W::kPatchTiles) {
      float product[P::kCount][kVector];
      patch.spread(products[batch], tile, product);
      const int first_slot = batch * W::kBatchRows + warp.row();
      const int first_column = warp.column() + tile * kUnit + patch.column(0);
      const int at = work.column + first_column;
      float gamma[kVector];
      float beta[kVector];
      float dgamma[kVector] = {};
      float dbeta[kVector] = {};
      load_vector(p.gamma, at, norm ? p.width - at : 0, gamma);
      load_vector(p.beta, at, p.beta.data != nullptr ? p.width - at : 0, beta);
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const int slot = first_slot + patch.row(i);
        const int unit = units.of(slot);
        const int count = unit < p.rank ? p.width - at : 0;
        const int64_t index = static_cast<int64_t>(unit) * p.width + at;
        const float db = shared.sums[slot];
        if (norm) {
          float w[kVector];
          load_vector(p.w_down, index, count, w);
          if (p.assignment_down != nullptr) Down::see(p, e, unit, at, w);
          for (int n = 0; n < kVector; ++n) {
            dgamma[n] += w[n] * product[i][n];
            dbeta[n] += w[n] * db;
            product[i][n] = product[i][n] * gamma[n] + db * beta[n];
          }
        }
        if (p.assignment_down != nullptr) {
          const Owners owners = load_owners(p.assignment_down, p.wide_assignment_down, index, count);
          for (int n = 0; n < kVector; ++n) {
            product[i][n] = e < 0 || owners.of(n) == e ? factor * product[i][n] : 0.0f;
          }
        }
        put_part(work.part, p.width, index, count, kListed || add, product[i]);
      }
      if (norm) {
        sum_rows<P>(dgamma);
        sum_rows<P>(dbeta);
        if (patch.lane < P::kPerRow) {
          for (int n = 0; n < kVector; ++n) {
            shared.results.gamma[first_slot / kUnit][first_column + n] = dgamma[n];
            shared.results.beta[first_slot / kUnit][first_column + n] = dbeta[n];
          }
        }
      }
    }
  }
  __syncthreads();
  const int thread = thread_of_block();
  const int at = work.column + thread;
  if (norm && thread < W::kColumns && at < p.width) {
    float dgamma = 0.0f;
    float dbeta = 0.0f;
    for (int tile = 0; tile < W::kUnitTiles; ++tile) {
      dgamma += shared.results.gamma[tile][thread];
      dbeta += shared.results.beta[tile][thread];
    }
    put_part(work.part, parts.begin_gamma + at, add, dgamma);
    put_part(work.part, parts.begin_beta + at, add, dbeta);
  }
  if (work.column == 0 && thread < kRank) {
    const int unit = units.of(thread);
    if (unit < p.rank) put_part(work.part, parts.begin_b_down + unit, kListed || add, shared.sums[thread]);
  }
}

// The gradients of b_up from the tokens of expert e; returns the thread's share of <b_up, sum dout>.
template <typename E, int kRank>
__device__ inline float put_up_bias(const AdapterParams& p, const AdapterParts& parts, const WeightWork& work, int e,
                                    bool add, float scale, const WeightsShared<E, kRank>& shared) {
  const int thread = thread_of_block();
  const int at = work.column + thread;
  if (p.b_up.data == nullptr || thread >= WeightsShared<E, kRank>::kColumns || at >= p.width) return 0.0f;
  const float sum = shared.sums[thread];
  float* gradient = work.part + parts.begin_b_up + at;
  if (p.bias_rows == 0) put_part(gradient, 0, add, scale * sum);
  for (int row = 0; row < p.bias_rows; ++row) {
    const float share = e < 0 ? scale * sum / static_cast<float>(p.bias_rows) : row == e ? scale * sum : 0.0f;
    put_part(gradient, static_cast<int64_t>(row) * p.width, add, share);
  }
  return sum * up_bias(p, e, at);
}

// The gradients of w_up and b_up, and the bias's part of that of the scale, from the tokens of expert e.
template <bool kListed = false, typename E, int kRank, typename Accumulators>
__device__ inline void put_up(const AdapterParams& p, const AdapterParts& parts, const AdapterBackward& b,
                              const WeightWork& work, int e, bool add, float scale, WeightsShared<E, kRank>& shared,
                              const Accumulators* products) {
  using W = WeightsShared<E, kRank>;
  using P = typename W::P;
  const float gain = p.assignment != nullptr ? scale * factor_of(p, e) : scale;
  const bool masked = p.assignment != nullptr && e >= 0;
  float* gradient = work.part + parts.begin_up;
  const typename W::Warp warp;
  const P patch(shared.results.patch[warp.warp]);
  const UnitsOf<kListed> units(p, e);
  const bool first_units = !kListed || e >= kMergedExpert;
  const float dscale = first_units ? put_up_bias(p, parts, work, e, add, scale, shared) : 0.0f;
#pragma unroll
  for (int batch = 0; batch < W::kBatches; ++batch) {
#pragma unroll
    for (int tile = 0; tile < W::Warp::kTiles; tile += W::kPatchTiles) {
      float product[P::kCount][kVector];
      patch.spread(products[batch], tile, product);
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const int unit = units.of(batch * W::kBatchRows + warp.row() + patch.row(i));
        const int at = work.column + warp.column() + tile * kUnit + patch.column(i);
        const int count = unit < p.rank ? p.width - at : 0;
#pragma unroll
        for (int n = 0; n < kVector; ++n) {
          const int64_t entry = static_cast<int64_t>(at + n) * p.rank + unit;
          const bool seen = n < count && (!masked || p.assignment[entry] == e);
          product[i][n] = seen ? gain * product[i][n] : 0.0f;
        }
        put_part(gradient, p.width, static_cast<int64_t>(unit) * p.width + at, count, kListed || add, product[i]);
      }
    }
  }
  if (b.scale.data == nullptr || !first_units) return;
  __syncthreads();
  add_up_columns(dscale, 1, shared);
  if (thread_of_block() == 0) {
    put_part(work.part, parts.begin_scale + work.column / W::kColumns, add, shared.sums[0]);
  }
}

// Zeros in the block's part of a projection, to which experts then add what their units receive.
template <int kColumns>
__device__ inline void clear_units(const AdapterParams& p, const AdapterParts& parts, const WeightWork& work) {
  float* gradient = work.part + (work.up ? parts.begin_up : 0) + work.column;
  const int columns = min(kColumns, p.width - work.column);
  for (int i = thread_of_block(); i < p.rank * columns; i += kThreads) {
    gradient[static_cast<int64_t>(i / columns) * p.width + i % columns] = 0.0f;
  }
  if (work.up || work.column != 0) return;
  for (int unit = thread_of_block(); unit < p.rank; unit += kThreads) work.part[parts.begin_b_down + unit] = 0.0f;
}

}  // namespace mosa
