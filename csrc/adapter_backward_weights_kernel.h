// The backward kernel over weights; adapter.h says what it computes.
#pragma once

#include <cstdint>

#include "adapter_weight_parts.h"

namespace mosa {

// Neighbouring tokens, the step of a product. Within a group, as five in six runs of 32 are where an image has 197
// tokens, nobody has to look up whose each of them is.
struct TokenRun {
  int token;   // the first; work.end or more: none
  bool mixed;  // whether some may be of another expert
};

__device__ inline bool belongs(const AdapterParams& p, const WeightWork& work, int e, const TokenRun& run, int row) {
  return run.token + row < work.end && (!run.mixed || expert_of(p, run.token + row) == e);
}

// The first run of kTokens tokens from `token` on that has one of expert e.
template <int kTokens>
__device__ inline TokenRun next_run(const AdapterParams& p, const WeightWork& work, int e, int token) {
  for (; work.varied && token < work.end; token += kTokens) {
    const int first = token / p.expert.tokens;
    const int last = (min(token + kTokens, work.end) - 1) / p.expert.tokens;
    for (int group = first; group <= last; ++group) {
      if (expert_of(p, group * p.expert.tokens) == e) return {token, first != last};
    }
  }
  return {token, false};
}

// The smallest id above `after` among the block's tokens; all threads take part. Ends with a barrier.
__device__ inline int next_expert_of(const AdapterParams& p, const WeightWork& work, int after, float* shares) {
  if (!work.varied) return after < kMergedExpert ? expert_of(p, work.begin) : kNoExpert;
  const int thread = thread_of_block();
  int next = kNoExpert;
  const int last = (work.end - 1) / p.expert.tokens;
  for (int group = work.begin / p.expert.tokens + thread; group <= last; group += kThreads) {
    const int e = expert_of(p, group * p.expert.tokens);
    if (e > after) next = min(next, e);
  }
  int* ids = reinterpret_cast<int*>(shares);
  ids[thread] = next;
  __syncthreads();
  for (int i = 0; i < kThreads; ++i) next = min(next, ids[i]);
  __syncthreads();
  return next;
}

// With lists of units, the merged adapter's come kRank at a time: its id is ~u for those from unit u on.

// products[batch] = left^T right, and `shared.sums`, over the tokens of expert e. Ends with a barrier.
template <bool kListed = false, typename E, int kRank, typename Accumulators>
__device__ inline void sum_tokens(const AdapterParams& p, const AdapterBackward& b, const WeightWork& work, int e,
                                  WeightsShared<E, kRank>& shared, Accumulators* products) {
  using W = WeightsShared<E, kRank>;
  constexpr int kTokens = W::kTokens;
  const bool norm = !work.up && p.gamma.data != nullptr;
  const AdapterTensor& from = work.up ? b.grad_out : p.x;
  const bool direct = !norm && from.dtype == Element<E>::kDType && from.wide;
  auto& operands = shared.operands;

  AdapterTensor units = work.left;
  if (kListed && e < 0) units.data = static_cast<const E*>(units.data) + ~e;
  typename W::Left left;
  typename W::Right right;
  const typename W::Warp warp;
  float sum = 0.0f;
  shared.shares[thread_of_block()] = 0.0f;
#pragma unroll
  for (int batch = 0; batch < W::kBatches; ++batch) products[batch].clear();

  const int id = kListed ? max(e, kMergedExpert) : e;
  TokenRun next = next_run<kTokens>(p, work, id, work.begin);
#pragma unroll 1
  for (int buffer = 0, step = 0;; buffer ^= 1, ++step) {
    TokenRun run = next;
    if (kListed) run.mixed = work.varied;  // with lists there is no register left for it
    const int token = run.token;
    const auto take = [&](int row) { return belongs(p, work, id, run, row); };
    if (token < work.end) {
      left.begin(units, true, token, take, 0, [](int) { return kVector; }, operands.left[buffer]);
      right.begin(from, direct, token, take, work.column, [&](int at) { return p.width - at; }, operands.right[buffer]);
      next = next_run<kTokens>(p, work, id, token + kTokens);
    }
    if (step > 0) {
      const float share = work.up ? share_of_column<W::kColumns, typename W::Right, kTokens>(operands.right[buffer ^ 1])
                                  : share_of_column<kRank, typename W::Left, kTokens>(operands.left[buffer ^ 1]);
      add_exactly(share, sum, shared.shares[thread_of_block()]);  // no register is left for the excess or its address
#pragma unroll
      for (int batch = 0; batch < W::kBatches; ++batch) {
        const E* const a = operands.left[buffer ^ 1] + batch * W::kBatchRows + warp.row();
        const E* const c = operands.right[buffer ^ 1] + warp.column();
        if (leaves_out_tiles<kRank, kListed>(p, work.up ? e : kMergedExpert)) {
          const OwnedTiles owned(p, e, work.column + warp.column());
          const TilesOfResult<W::Warp::kTiles> tiles(owned, (batch * W::kBatchRows + warp.row()) / kUnit);
          products[batch].template multiply<true, false>(a, W::Left::kRow, c, W::Right::kRow, kUnit, kTokens, p.tf32,
                                                         tiles);
        } else {
          products[batch].template multiply<true, false>(a, W::Left::kRow, c, W::Right::kRow, kUnit, kTokens, p.tf32);
        }
      }
    }
    if (token >= work.end) break;
    left.finish(units, true, false, operands.left[buffer], [](int, int, float (&)[kVector]) {});
    right.finish(from, direct, false, operands.right[buffer], [&](int, int row, float (&value)[kVector]) {
      if (!norm || !take(row)) return;
      const float mean = b.mean[token + row];
      const float rstd = b.rstd[token + row];
      for (int i = 0; i < kVector; ++i) value[i] = (value[i] - mean) * rstd;
    });
    __syncthreads();
  }
  add_up_columns(sum, work.up ? W::kColumns : kRank, shared);
}

// blockIdx: the columns, the part, and the projection where both are wanted.
template <typename E, int kRank, bool kListed>
__global__ void __launch_bounds__(kThreads, 2)
    adapter_backward_weights_kernel(const __grid_constant__ AdapterParams p, const __grid_constant__ AdapterBackward b,
                                    const __grid_constant__ TokenBuffers buffers,
                                    const __grid_constant__ AdapterParts parts, float* all_parts) {
  if (!kServed<E>) return __trap();
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  using W = WeightsShared<E, kRank>;
  auto& shared = *reinterpret_cast<W*>(dynamic_shared);
  WeightWork work = {};
  work.up = parts.up && blockIdx.z == gridDim.z - 1;
  work.varied = p.expert.groups > 1 &&
                (kListed || (work.up ? p.assignment != nullptr || p.bias_rows > 0 : p.assignment_down != nullptr));
  work.begin = static_cast<int>(blockIdx.y) * parts.tokens;
  work.end = min(work.begin + parts.tokens, p.tokens);
  work.column = static_cast<int>(blockIdx.x) * W::kColumns;
  work.part = all_parts + blockIdx.y * parts.length;
  work.left = {work.up ? buffers.h : buffers.da, kListed ? buffers.stride : kRank, Element<E>::kDType, true};

  if (kListed) clear_units<W::kColumns>(p, parts, work);
  bool add = false;
  int e = next_expert_of(p, work, kMergedExpert - 1, shared.shares);
  while (e != kNoExpert) {
    Accumulator<E, W::Warp::kTiles> products[W::kBatches];
    sum_tokens<kListed>(p, b, work, e, shared, products);
    if (work.up) {
      // Looked up so late that it takes no register before.
      const float scale = p.scale.data != nullptr ? load_number(p.scale, 0) : p.scale_value;
      put_up<kListed>(p, parts, b, work, e, add, scale, shared, products);
    } else {
      put_down<kListed>(p, parts, work, e, add, shared, products);
    }
    add = true;
    __syncthreads();
    if (kListed && e < 0 && ~e + kRank < p.rank) {
      e -= kRank;
    } else {
      e = next_expert_of(p, work, kListed ? max(e, kMergedExpert) : e, shared.shares);
    }
  }
}

}  // namespace mosa
