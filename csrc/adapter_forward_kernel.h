// The kernel of the forward pass; adapter.h says what it computes.
#pragma once

#include <cstdint>

#include "adapter_project.h"

namespace mosa {

template <typename E, int kRank, bool kListed = false>
struct ForwardShared {
  using S = Step<E, kRank>;
  using Up = UpTile<E, kRank, S::kColumns, kListed>;
  using First = WarpTiles<S::kTokens, kRank>;
  using Second = WarpTiles<S::kTokens, S::kColumns>;
  static constexpr int kPatchTiles = First::kTiles > 1 ? 2 : 1;
  using FirstPatch = Patch<kPatchTiles>;
  using SecondPatch = Patch<Second::kTiles>;
  static constexpr int kPatch = larger(FirstPatch::kSize, SecondPatch::kSize);
  static constexpr int kRow = padded_row<E>(kRank);

  struct Output {
    alignas(128) E up[S::kBuffers][Up::kSize];
    alignas(128) float patch[kWarps][kPatch];
  };
  union {
    ProjectTiles<E, kRank, kListed> project;
    Output output;
  };
  alignas(128) E h[S::kTokens * kRow];
  float bias[2][S::kColumns];  // of the output, for the columns of a step
  TokenTable<S::kTokens> tokens;
  UnitTable<kRank> units;
};

// h = dropout(act(z)) as the second product takes it; stores mean and rstd. Ends with a barrier.
template <typename E, int kRank, bool kListed, typename Params>
__device__ inline void bottleneck(const Params& p, const AdapterForward& out, int first, int e,
                                  ForwardShared<E, kRank, kListed>& shared) {
  using F = ForwardShared<E, kRank, kListed>;
  using Warp = typename F::First;
  using P = typename F::FirstPatch;
  auto& tokens = shared.tokens;
  Accumulator<E, Warp::kTiles> z;
  project<true>(p, first, e, tokens, shared.project, shared.units, z);
  if (has_norm(p)) {
    for (int row = thread_of_block(); row < F::S::kTokens; row += kThreads) {
      if (!tokens.valid(row)) continue;
      out.mean[first + row] = tokens.mean[row];
      out.rstd[first + row] = tokens.rstd[row];
    }
  }
  const Warp warp;
  const P patch(shared.output.patch[warp.warp]);
  const UnitsOf<kListed> units(p, e);
  const float rise = 1.0f / reach_of<E>(p);
#pragma unroll
  for (int tile = 0; tile < Warp::kTiles; tile += F::kPatchTiles) {
    float value[P::kCount][kVector];
    patch.spread(z, tile, value);
#pragma unroll
    for (int i = 0; i < P::kCount; ++i) {
      const int row = warp.row() + patch.row(i);
      const int unit = warp.column() + tile * kUnit + patch.column(i);
      const Dropout dropout(p, tokens.valid(row) ? first + row : 0);
      const float rstd = tokens.rstd[row] * rise;
#pragma unroll 1
      for (int n = 0; n < kVector; n += kTurn) {
#pragma unroll
        for (int k = 0; k < kTurn; ++k) {
          const int at = unit + n + k;
          const float normed = rstd * (value[i][k] - tokens.seen[row] * shared.units.s[at]);
          const float kept = dropout.factor(units, at);
          const float active = activate(normed + shared.units.bias[at], p.activation).value;
          value[i][k] = kept == 0.0f ? 0.0f : kept * active;
        }
        rotate<kTurn>(value[i]);
      }
      put_vector(shared.h + row * F::kRow + unit, value[i]);
    }
  }
  __syncthreads();
}

// [x] + [residual] + scale * (h w_up_e^T + b_up_e) for the tokens of expert e.
template <typename E, int kRank, bool kListed, typename Params>
__device__ inline void write_output(const Params& p, const AdapterForward& out, int first, int e, float scale,
                                    ForwardShared<E, kRank, kListed>& shared) {
  using F = ForwardShared<E, kRank, kListed>;
  using Warp = typename F::Second;
  using P = typename F::SecondPatch;
  using Up = typename F::Up;
  constexpr int kColumns = F::S::kColumns;
  constexpr int kBuffers = F::S::kBuffers;
  const float gain = p.assignment != nullptr ? scale * factor_of(p, e) : scale;
  const auto& tokens = shared.tokens;

  Up up;
  up.open(p, e);
  const Warp warp;
  const P patch(shared.output.patch[warp.warp]);
  const int thread = thread_of_block();
#pragma unroll 1
  for (int next = 0, buffer = 0;; next += kColumns, buffer ^= 1) {
    const int column = next - kColumns;  // of the step whose product is due; before the first one there is none
    if (next < p.width) up.begin(p, next);
    if (column >= 0 && warp.busy()) {
      EarlyVector<E> x[P::kCount];
      EarlyVector<E> residual[P::kCount];
      int count[P::kCount];
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        const int row = warp.row() + patch.row(i);
        const int at = column + warp.column() + patch.column(i);
        const int64_t token = first + row;
        count[i] = tokens.expert[row] == e ? columns_from(p, at) : 0;
        if (p.add_input) x[i].begin(p.x, token * p.x.stride + at, count[i]);
        if (p.residual.data != nullptr) residual[i].begin(p.residual, token * p.residual.stride + at, count[i]);
      }
      Accumulator<E, Warp::kTiles> y;
      y.clear();
      const E* const h = shared.h + warp.row() * F::kRow;
      const E* const w = shared.output.up[kBuffers == 1 ? 0 : buffer ^ 1] + warp.column() * Up::kRow;
      if (leaves_out_tiles<kRank, kListed>(p, e)) {
        const TilesByUnit<Warp::kTiles> tiles(OwnedTiles(p, e, column + warp.column()));
        y.template multiply<false, true>(h, F::kRow, w, Up::kRow, kUnit * Up::kRow, kRank, p.tf32, tiles);
      } else {
        y.template multiply<false, true, kStepsAtOnce<Params>>(h, F::kRow, w, Up::kRow, kUnit * Up::kRow, kRank,
                                                               p.tf32);
      }
      float value[P::kCount][kVector];
      patch.spread(y, 0, value);
#pragma unroll
      for (int i = 0; i < P::kCount; ++i) {
        if (count[i] <= 0) continue;
        const int64_t token = first + warp.row() + patch.row(i);
        const int at = column + warp.column() + patch.column(i);
        const float* bias = shared.bias[buffer ^ 1] + warp.column() + patch.column(i);
        float summand[kVector];
        for (int n = 0; n < kVector; ++n) value[i][n] = value[i][n] * gain + bias[n];
        if (p.add_input) {
          x[i].finish(p.x, token * p.x.stride + at, count[i], summand);
          for (int n = 0; n < kVector; ++n) value[i][n] += summand[n];
        }
        if (p.residual.data != nullptr) {
          residual[i].finish(p.residual, token * p.residual.stride + at, count[i], summand);
          for (int n = 0; n < kVector; ++n) value[i][n] += summand[n];
        }
        store_vector(out.out, p.x.dtype, kIsPlain<Params> || out.wide_out, token * p.width + at, count[i], value[i]);
      }
    }
    if (next >= p.width) break;
    if (kBuffers == 1) __syncthreads();
    up.finish(p, next, e, shared.output.up[kBuffers == 1 ? 0 : buffer]);
    if (thread < kColumns) shared.bias[buffer][thread] = scale * up_bias(p, e, next + thread);
    __syncthreads();
  }
}

template <typename E, int kRank, bool kListed, typename Params>
__global__ void __launch_bounds__(kThreads, kBlocks<Params, kRank, 32>)
    adapter_forward_kernel(const __grid_constant__ Params p, const __grid_constant__ AdapterForward out) {
  if (!kServed<E>) return __trap();
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  auto& shared = *reinterpret_cast<ForwardShared<E, kRank, kListed>*>(dynamic_shared);
  const int first = static_cast<int>(blockIdx.x) * Step<E, kRank>::kTokens;
  shared.tokens.load(p, first);
  const float scale = p.scale.data != nullptr ? load_number(p.scale, 0) : p.scale_value;
  bool fresh = true;
  for (int e = shared.tokens.next_expert(kMergedExpert - 1); e != kNoExpert; e = shared.tokens.next_expert(e)) {
    if (fresh || kListed || p.assignment_down != nullptr) bottleneck(p, out, first, e, shared);
    fresh = false;
    write_output(p, out, first, e, scale, shared);
    __syncthreads();
  }
}

}  // namespace mosa
