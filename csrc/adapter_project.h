// The first product, x Wg^T, with LayerNorm's statistics: what the forward pass and the backward pass over tokens
// share.
#pragma once

#include <cstdint>

#include "adapter_tiles.h"

namespace mosa {

// Tokens and columns of a step, chosen so that no kernel takes more than 64 KiB of shared memory (a T4's limit).
// kBuffers: tiles of the projections in shared memory, 2 to fill one while the other is multiplied.
template <int kTokens_, int kColumns_, int kBuffers_>
struct StepOf {
  static constexpr int kTokens = kTokens_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kBuffers = kBuffers_;
};
template <typename E, int kRank>
struct Step;
template <typename E>
struct Step<E, 32> : StepOf<64, 64, 2> {};
template <typename E>
struct Step<E, 64> : StepOf<64, 64, 2> {};
template <typename E>
struct Step<E, 128> : StepOf<64, 32, 2> {};
template <typename E>
struct Step<E, 256> : StepOf<32, 32, 1> {};
template <>
struct Step<float, 32> : StepOf<64, 32, 2> {};
template <>
struct Step<float, 64> : StepOf<64, 32, 2> {};
template <>
struct Step<float, 128> : StepOf<32, 32, 1> {};
template <>
struct Step<float, 256> : StepOf<16, 16, 1> {};

// What a block knows of its tokens, in shared memory.
template <int kTokens>
struct TokenTable {
  int expert[kTokens];  // kNoExpert beyond the last token, and for tokens that another launch serves
  float mean[kTokens];
  float rstd[kTokens];
  float seen[kTokens];  // the mean of what the matrix units saw of the row

  __device__ bool valid(int row) const { return expert[row] != kNoExpert; }

  // Ends with a barrier.
  __device__ void load(const AdapterParams& p, int first) {
    for (int row = thread_of_block(); row < kTokens; row += kThreads) {
      const int e = first + row < p.tokens ? expert_of(p, first + row) : kNoExpert;
      const bool served = p.served == kServeAll || (p.served == kServeMerged) == (e < 0);
      expert[row] = served ? e : kNoExpert;
      mean[row] = seen[row] = 0.0f;
      rstd[row] = 1.0f;
    }
    __syncthreads();
  }

  // The smallest id above `after`; kNoExpert where there is none. The whole warp takes part.
  __device__ int next_expert(int after) const {
    int next = kNoExpert;
#pragma unroll
    for (int row = thread_of_block() % kWarp; row < kTokens; row += kWarp) {
      if (expert[row] > after) next = min(next, expert[row]);
    }
    return least_of_lanes(next);
  }
};

// Shared memory of the first product.
template <typename E, int kRank, bool kListed = false>
struct ProjectTiles {
  static constexpr int kColumns = Step<E, kRank>::kColumns;
  using X = RowTile<E, Step<E, kRank>::kTokens, kColumns>;
  using Down = DownTile<E, kRank, kColumns, kListed>;
  alignas(128) E x[2][X::kSize];
  alignas(128) E down[Step<E, kRank>::kBuffers][Down::kSize];
};

// Row sums of Wg and the bias of the bottleneck.
template <int kRank>
struct UnitTable {
  float s[kRank];
  float bias[kRank];
};

// What LayerNorm's tokens are multiplied with on their way into a product in half precision: a column of 100 000 in a
// float32 stream, which LayerNorm makes small, is beyond fp16.
template <typename E, typename Params>
__device__ inline float reach_of(const Params& p) {
  const bool wider = Element<E>::kDType == kFloat16 && p.x.dtype != kFloat16 && has_norm(p);
  return wider ? 0.0625f : 1.0f;
}

// accumulators = x Wg^T for expert e, or reach_of (x - shift) Wg^T where x is converted on its way; fills `units`. With
// kStatistics it finds mean and rstd, else they are in the table. Ends with a barrier.
template <bool kStatistics, typename E, int kRank, bool kListed, typename Params, typename Accumulators>
__device__ inline void project(const Params& p, int first, int e, TokenTable<Step<E, kRank>::kTokens>& tokens,
                               ProjectTiles<E, kRank, kListed>& shared, UnitTable<kRank>& units,
                               Accumulators& accumulators) {
  using Tiles = ProjectTiles<E, kRank, kListed>;
  using X = typename Tiles::X;
  using Down = typename Tiles::Down;
  using Warp = WarpTiles<Step<E, kRank>::kTokens, kRank>;
  constexpr int kColumns = Tiles::kColumns;
  constexpr int kBuffers = Step<E, kRank>::kBuffers;
  const bool norm = has_norm(p);
  const bool direct = p.x.dtype == Element<E>::kDType && p.x.wide && !(norm && p.x.dtype == kFloat32);
  const bool centre = norm && !direct;
  const auto take = [&](int row) { return tokens.valid(row); };
  const auto left = [&](int at) { return columns_from(p, at); };
  const float reach = reach_of<E>(p);

  X x;
  const Warp warp;
  Down down;
  down.open(p, e);
  accumulators.clear();
  float shift[X::S::kCount] = {};
  float total[X::S::kCount] = {};
  float squares[X::S::kCount] = {};
  if (norm && !kStatistics) {
#pragma unroll
    for (int j = 0; j < X::S::kCount; ++j) {
      if (x.has(j)) shift[j] = tokens.mean[x.row(j)];
    }
  }

  // Each step loads the next one's tiles beside its product; the first one has no product.
#pragma unroll 1
  for (int next = 0, buffer = 0;; next += kColumns, buffer ^= 1) {
    if (next < p.width) {
      x.begin(p.x, direct, first, take, next, left, shared.x[buffer]);
      down.begin(p, next);
    }
    if (next == 0 && norm && kStatistics) {
      if (direct) wait_for_copies();
#pragma unroll
      for (int j = 0; j < X::S::kCount; ++j) {
        if (!x.has(j)) continue;
        float value[kVector];
        x.peek(p.x, direct, shared.x[0], j, value);
        float sum = 0.0f;
        for (int i = 0; i < kVector; ++i) sum += value[i];  // zeros beyond d
        shift[j] = sum_lanes<X::S::kPerRow>(sum) / static_cast<float>(min(kColumns, p.width));
      }
    }
    if (next > 0) {
      accumulators.template multiply<false, true, kStepsAtOnce<Params>>(
          shared.x[buffer ^ 1] + warp.row() * X::kRow, X::kRow,
          shared.down[kBuffers == 1 ? 0 : buffer ^ 1] + warp.column() * Down::kRow, Down::kRow, kUnit * Down::kRow,
          kColumns, p.tf32);
    }
    if (next >= p.width) break;
    if (kBuffers == 1) __syncthreads();
    x.finish(p.x, direct, norm && kStatistics, shared.x[buffer], [&](int j, int, float (&value)[kVector]) {
      if (!norm) return;
      const int count = columns_from(p, next + x.column());
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        value[i] -= shift[j];
        if (count < kVector && i >= count) value[i] = 0.0f;
        if (kStatistics) {
          total[j] += value[i];
          squares[j] += value[i] * value[i];
        }
        value[i] *= reach;
      }
    });
    down.finish(p, next, e, shared.down[kBuffers == 1 ? 0 : buffer]);
    __syncthreads();
  }

  down.store_sums(p, units.s, units.bias);
  if (norm && kStatistics) {
    const float inverse = 1.0f / static_cast<float>(p.width);
#pragma unroll
    for (int j = 0; j < X::S::kCount; ++j) {
      if (!x.has(j)) continue;
      const float offset = sum_lanes<X::S::kPerRow>(total[j]) * inverse;
      const float square = sum_lanes<X::S::kPerRow>(squares[j]) * inverse;
      if (x.column() != 0) continue;
      const int row = x.row(j);
      tokens.mean[row] = shift[j] + offset;
      tokens.rstd[row] = 1.0f / sqrtf(fmaxf(square - offset * offset, 0.0f) + p.norm_eps);
      tokens.seen[row] = centre ? reach * offset : shift[j] + offset;
    }
  } else if (norm) {
    for (int row = thread_of_block(); row < Step<E, kRank>::kTokens; row += kThreads) {
      tokens.seen[row] = centre ? 0.0f : tokens.mean[row];
    }
  }
  __syncthreads();
}

}  // namespace mosa
