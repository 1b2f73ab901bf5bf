// The backward kernel over tokens; adapter.h says what it computes.
#pragma once

#include <cstdint>

#include "adapter_project.h"

namespace mosa {

template <typename E, int kRank, bool kListed = false>
struct TokensShared {
  using S = Step<E, kRank>;
  using Grad = RowTile<E, S::kTokens, S::kColumns>;
  using Up = UpTile<E, kRank, S::kColumns, kListed>;
  using Down = DownTile<E, kRank, S::kColumns, kListed>;
  using First = WarpTiles<S::kTokens, kRank>;
  using Second = WarpTiles<S::kTokens, S::kColumns>;
  static constexpr int kPatchTiles = First::kTiles > 1 && sizeof(ProjectTiles<E, kRank, kListed>) > 20000 ? 2 : 1;
  using FirstPatch = Patch<kPatchTiles>;
  using SecondPatch = Patch<Second::kTiles>;
  static constexpr int kRow = padded_row<E>(kRank);

  struct Pull {
    alignas(128) E grad[2][Grad::kSize];
    alignas(128) E up[S::kBuffers][Up::kSize];
  };
  struct Output {
    alignas(128) E down[S::kBuffers][Down::kSize];
    alignas(128) float patch[kWarps][SecondPatch::kSize];
  };
  union {
    ProjectTiles<E, kRank, kListed> project;
    Pull pull;
    alignas(128) float patch[kWarps][FirstPatch::kSize];
    Output output;
  };
  alignas(128) E da[S::kTokens * kRow];
  TokenTable<S::kTokens> tokens;
  UnitTable<kRank> units;
  float c1[First::kGroups][S::kTokens];  // each group of warps has its units' share
  float c2[First::kGroups][S::kTokens];
  float scale[kWarps];  // each warp's share of the gradient of the scale
};

// dh += dout w_up_e for the rows of expert e, without scale and factor. Comes after a barrier and ends with one.
template <typename E, int kRank, bool kListed, typename Params, typename Tensor, typename Accumulators>
__device__ inline void pull_back(const Params& p, const Tensor& grad_out, int first, int e,
                                 TokensShared<E, kRank, kListed>& shared, Accumulators& dh) {
  using T = TokensShared<E, kRank, kListed>;
  using Grad = typename T::Grad;
  using Up = typename T::Up;
  constexpr int kColumns = T::S::kColumns;
  constexpr int kBuffers = T::S::kBuffers;
  const bool direct = grad_out.dtype == Element<E>::kDType && grad_out.wide;
  const auto take = [&](int row) { return shared.tokens.expert[row] == e; };
  const auto left = [&](int at) { return columns_from(p, at); };
  auto& pull = shared.pull;

  Grad grad;
  Up up;
  up.open(p, e);
  const typename T::First warp;
#pragma unroll 1
  for (int next = 0, buffer = 0;; next += kColumns, buffer ^= 1) {
    if (next < p.width) {
      grad.begin(grad_out, direct, first, take, next, left, pull.grad[buffer]);
      up.begin(p, next);
    }
    if (next > 0) {
      const E* const dout = pull.grad[buffer ^ 1] + warp.row() * Grad::kRow;
      const E* const w = pull.up[kBuffers == 1 ? 0 : buffer ^ 1] + warp.column();
      if (leaves_out_tiles<kRank, kListed>(p, e)) {
        const TilesByColumn<T::First::kTiles> tiles = {OwnedTiles(p, e, next - kColumns), warp.column() / kUnit};
        dh.template multiply<false, false>(dout, Grad::kRow, w, Up::kRow, kUnit, kColumns, p.tf32, tiles);
      } else {
        dh.template multiply<false, false, kStepsAtOnce<Params>>(dout, Grad::kRow, w, Up::kRow, kUnit, kColumns,
                                                                 p.tf32);
      }
    }
    if (next >= p.width) break;
    if (kBuffers == 1) __syncthreads();
    grad.finish(grad_out, direct, false, pull.grad[buffer], [](int, int, float (&)[kVector]) {});
    up.finish(p, next, e, pull.up[kBuffers == 1 ? 0 : buffer]);
    __syncthreads();
  }
  __syncthreads();
}

// From z and dh: h and da of the rows that take(row), into the buffers, da into shared memory too, with c1 and c2 from
// the rounded da, so that what LayerNorm projects out is gone exactly. Ends with a barrier.
template <typename E, int kRank, bool kListed, typename Params, typename Accumulators, typename Take>
__device__ inline void through_activation(const Params& p, const TokenBuffers& buffers, int first, int group,
                                          float scale, const Take& take, const Accumulators& z, const Accumulators& dh,
                                          TokensShared<E, kRank, kListed>& shared) {
  using T = TokensShared<E, kRank, kListed>;
  using P = typename T::FirstPatch;
  const auto& tokens = shared.tokens;
  const auto& units = shared.units;
  const UnitsOf<kListed> drawn(p, group);
  const int stride = kListed ? buffers.stride : kRank;
  const typename T::First warp;
  const P patch(shared.patch[warp.warp]);
  const float rise = 1.0f / reach_of<E>(p);
  float c1[P::kCount] = {};
  float c2[P::kCount] = {};
  float dscale = 0.0f;
#pragma unroll
  for (int tile = 0; tile < T::First::kTiles; tile += T::kPatchTiles) {
    float active[P::kCount][kVector];
    float slope[P::kCount][kVector];
    patch.spread(z, tile, active);
    patch.spread(dh, tile, slope);
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      const int row = warp.row() + patch.row(i);
      const int unit = warp.column() + tile * kUnit + patch.column(i);
      const int e = tokens.expert[row];
      const float factor = p.assignment != nullptr && e != kNoExpert ? factor_of(p, e) : 1.0f;
      const Dropout dropout(p, tokens.valid(row) ? first + row : 0);
      const float rstd = tokens.rstd[row] * rise;
#pragma unroll 1
      for (int n = 0; n < kVector; n += kTurn) {
        float pre[kTurn];
#pragma unroll
        for (int k = 0; k < kTurn; ++k) {
          const int at = unit + n + k;
          const float normed = rstd * (active[i][k] - tokens.seen[row] * units.s[at]);
          const Activated activated = activate(normed + units.bias[at], p.activation);
          const float kept = dropout.factor(drawn, at);
          active[i][k] = kept == 0.0f ? 0.0f : kept * activated.value;
          const float dh = factor * slope[i][k];
          if (take(row)) dscale += active[i][k] * dh;
          slope[i][k] = kept == 0.0f ? 0.0f : kept * scale * dh * activated.slope;
          pre[k] = normed;
        }
        static_assert(kTurn == 2, "a pair");
        round_pair<E>(slope[i][0], slope[i][1]);
#pragma unroll
        for (int k = 0; k < kTurn; ++k) {
          c1[i] += slope[i][k] * units.s[unit + n + k];
          c2[i] += slope[i][k] * pre[k];
        }
        rotate<kTurn>(active[i]);
        rotate<kTurn>(slope[i]);
      }
      put_vector(shared.da + row * T::kRow + unit, slope[i]);
      if (buffers.h != nullptr && take(row)) {
        const int64_t at = (static_cast<int64_t>(first) + row) * stride + unit;
        put_vector(static_cast<E*>(buffers.h) + at, active[i]);
        put_vector(static_cast<E*>(buffers.da) + at, slope[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < P::kCount; ++i) {
    const float first_sum = sum_lanes<P::kPerRow>(c1[i]);
    const float second_sum = sum_lanes<P::kPerRow>(c2[i]);
    if (patch.column(i) == 0) {
      shared.c1[warp.group()][warp.row() + patch.row(i)] = first_sum / static_cast<float>(p.width);
      shared.c2[warp.group()][warp.row() + patch.row(i)] = second_sum / static_cast<float>(p.width);
    }
  }
  dscale = sum_lanes<kWarp>(dscale);
  if (patch.lane == 0) shared.scale[warp.warp] += dscale;
  __syncthreads();
}

// dx = [dout] + rstd (da Wg - c1 - xhat c2), or [dout] + da w_down without LayerNorm, for the rows that take(row).
template <typename E, int kRank, bool kListed, typename Params, typename Tensor, typename Take>
__device__ inline void write_dx(const Params& p, const Tensor& grad_out, const AdapterBackward& b, int first, int e,
                                const Take& take, TokensShared<E, kRank, kListed>& shared) {
  using T = TokensShared<E, kRank, kListed>;
  using P = typename T::SecondPatch;
  using Warp = typename T::Second;
  using Down = typename T::Down;
  constexpr int kColumns = T::S::kColumns;
  constexpr int kBuffers = T::S::kBuffers;
  const bool norm = has_norm(p);
  const auto& tokens = shared.tokens;
  auto& output = shared.output;

  Down down;
  const Warp warp;
  const P patch(output.patch[warp.warp]);
  float c1[P::kCount] = {};
  float c2[P::kCount] = {};
  if (norm) {
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      for (int group = 0; group < T::First::kGroups; ++group) {
        c1[i] += shared.c1[group][warp.row() + patch.row(i)];
        c2[i] += shared.c2[group][warp.row() + patch.row(i)];
      }
    }
  }
  down.open(p, e);
#pragma unroll 1
  for (int next = 0, buffer = 0;; next += kColumns, buffer ^= 1) {
    const int column = next - kColumns;
    if (next < p.width) down.begin(p, next);
    if (column >= 0 && warp.busy()) {
      EarlyVector<E> x[P::kCount];
      EarlyVector<E> grad[P::kCount];
      int count[P::kCount];
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const int row = warp.row() + patch.row(i);
        const int at = column + warp.column() + patch.column(i);
        const int64_t token = first + row;
        count[i] = take(row) ? columns_from(p, at) : 0;
        if (norm) x[i].begin(p.x, token * p.x.stride + at, count[i]);
        if (p.add_input) grad[i].begin(grad_out, token * grad_out.stride + at, count[i]);
      }
      Accumulator<E, Warp::kTiles> y;
      y.clear();
      y.template multiply<false, false, kStepsAtOnce<Params>>(
          shared.da + warp.row() * T::kRow, T::kRow, output.down[kBuffers == 1 ? 0 : buffer ^ 1] + warp.column(),
          Down::kRow, kUnit, kRank, p.tf32);
      float value[P::kCount][kVector];
      patch.spread(y, 0, value);
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        if (count[i] <= 0) continue;
        const int row = warp.row() + patch.row(i);
        const int64_t token = first + row;
        const int at = column + warp.column() + patch.column(i);
        float other[kVector];
        if (norm) {
          const float mean = tokens.mean[row];
          const float rstd = tokens.rstd[row];
          x[i].finish(p.x, token * p.x.stride + at, count[i], other);
          for (int n = 0; n < kVector; ++n) {
            value[i][n] = rstd * (value[i][n] - c1[i] - (other[n] - mean) * rstd * c2[i]);
          }
        }
        if (p.add_input) {
          grad[i].finish(grad_out, token * grad_out.stride + at, count[i], other);
          for (int n = 0; n < kVector; ++n) value[i][n] += other[n];
        }
        store_vector(b.x.data, p.x.dtype, kIsPlain<Params> || b.wide_dx, token * p.width + at, count[i], value[i]);
      }
    }
    if (next >= p.width) break;
    if (kBuffers == 1) __syncthreads();
    down.finish(p, next, e, output.down[kBuffers == 1 ? 0 : buffer]);
    __syncthreads();
  }
}

template <typename E, int kRank, bool kListed, typename Params>
__global__ void __launch_bounds__(kThreads, kBlocks<Params, kRank, 64>)
    adapter_backward_tokens_kernel(const __grid_constant__ Params p, const __grid_constant__ AdapterBackward b,
                                   const __grid_constant__ TokenBuffers buffers) {
  if (!kServed<E>) return __trap();
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  using T = TokensShared<E, kRank, kListed>;
  auto& shared = *reinterpret_cast<T*>(dynamic_shared);
  auto& tokens = shared.tokens;
  const auto& grad_out = grad_out_of(p, b);
  const int first = static_cast<int>(blockIdx.x) * T::S::kTokens;
  const float scale = p.scale.data != nullptr ? load_number(p.scale, 0) : p.scale_value;
  if (thread_of_block() < kWarps) shared.scale[thread_of_block()] = 0.0f;
  tokens.load(p, first);
  if (has_norm(p)) {
    for (int row = thread_of_block(); row < T::S::kTokens; row += kThreads) {
      if (!tokens.valid(row)) continue;
      tokens.mean[row] = b.mean[first + row];
      tokens.rstd[row] = b.rstd[first + row];
    }
    __syncthreads();
  }
  // A sparse down-projection makes z a matter of the expert, and so do lists of units; else all tokens of the block go
  // through it together.
  const bool together = !kListed && p.assignment_down == nullptr;
  int e = tokens.next_expert(kMergedExpert - 1);
  while (e != kNoExpert) {
    const int group = e;
    const auto take = [&](int row) { return together ? tokens.valid(row) : tokens.expert[row] == group; };
    Accumulator<E, T::First::kTiles> z;
    Accumulator<E, T::First::kTiles> dh;
    project<false>(p, first, group, tokens, shared.project, shared.units, z);
    dh.clear();
    do {
      pull_back(p, grad_out, first, e, shared, dh);
      e = tokens.next_expert(e);
    } while (together && e != kNoExpert);
    through_activation(p, buffers, first, group, scale, take, z, dh, shared);
    if (b.x.data != nullptr) write_dx(p, grad_out, b, first, group, take, shared);
    __syncthreads();
  }
  if (buffers.scale != nullptr && thread_of_block() == 0) {
    float dscale = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) dscale += shared.scale[warp];
    buffers.scale[blockIdx.x] = dscale;
  }
}

}  // namespace mosa
