// The backward pass over tokens and over weights in one launch, by clusters of blocks (sm_90 and later).
//
// A cluster owns a run of tiles of 32 tokens, and each of its blocks 128 of the columns. Of a tile a block keeps its
// columns of x and dout in shared memory, from where it multiplies them with its columns of Wg and w_up_e. The partial
// products of all blocks meet in distributed shared memory: a block adds up those of its share of the rows, in the
// order of the ranks, goes through the activation with them and gives h and da, rounded, to every block. With these
// each block writes its columns of dx and adds to its columns of both weights' gradients, which stay in registers until
// the run has ended or the expert changes. Two barriers of the cluster a tile, and the same bits on every run.
//
// Bytes through device memory, with A those of x: 3A, where two launches take 5A + 4H, and for every cluster its part
// of the gradients, 8 r d, which is written and read once. Weights and parts come from and go to the L2 cache.
//
// A block takes at r = 64 (32) 98 (77) KiB of shared memory: x and dout 34, since one tile of them is on its way while
// the other is worked on; Wg and w_up 35 (18); what is exchanged 28 (23). 64 (32) registers a thread hold the
// gradients. So two blocks share a multiprocessor. At r = 128 the gradients alone would take 128 registers, and with
// half as many columns to a block a cluster would have twelve at d = 768: left to two launches.
#pragma once

#include <cstdint>

#include "adapter_weight_parts.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#define MOSA_CLUSTERS
#endif

namespace mosa {

constexpr int kMostClusterBlocks = 8;  // that every GPU with clusters takes
constexpr int kMostClusterRank = 64;

template <typename E, int kRank>
struct ClusterShared {
  using Weights = WeightsShared<E, kRank>;
  static constexpr int kTokens = Weights::kTokens;
  static constexpr int kColumns = Weights::kColumns;
  using Rows = typename Weights::Right;  // x and dout
  using Units = typename Weights::Left;  // h and da
  using Down = DownTile<E, kRank, kColumns>;
  using Up = UpTile<E, kRank, kColumns>;
  using First = WarpTiles<kTokens, 2 * kRank>;  // x Wg^T and, beside it, dout w_up
  using Second = WarpTiles<kTokens, kColumns>;
  using P = Patch<Second::kTiles>;
  static constexpr int kPartialRow = 2 * kRank + 4;
  static_assert(Weights::kBatches == 1, "all units at a time");

  struct Exchange {
    union {
      alignas(128) float partial[kTokens * kPartialRow];
      alignas(128) float patch[kWarps][P::kSize];
    };
    alignas(128) E h[Units::kSize];
    alignas(128) E da[Units::kSize];
  };
  alignas(128) E x[2][Rows::kSize];
  alignas(128) E grad[2][Rows::kSize];
  alignas(128) E down[Down::kSize];
  alignas(128) E up[Up::kSize];
  union {
    Exchange exchange;
    Weights weights;
  };
  float mean[2][kTokens];
  float rstd[2][kTokens];
  float c1[kTokens];
  float c2[kTokens];
  UnitTable<kRank> own;    // over the block's columns
  UnitTable<kRank> units;  // over all columns
};

// Tokens of one group, whose expert is the same.
struct ClusterTile {
  int first;
  int tokens;
};

MOSA_HOST_DEVICE inline int cluster_tiles(const AdapterParams& p, int tokens_a_tile) {
  return (p.expert.tokens + tokens_a_tile - 1) / tokens_a_tile * p.expert.groups;
}

#ifdef MOSA_CLUSTERS

using Cluster = cooperative_groups::cluster_group;

template <typename T>
__device__ inline T* at_block(T* own, int rank) {
  return Cluster::map_shared_rank(own, rank);
}

template <int kTokens>
__device__ inline ClusterTile cluster_tile(const AdapterParams& p, int index) {
  const int per_group = (p.expert.tokens + kTokens - 1) / kTokens;
  const int begin = index % per_group * kTokens;
  return {index / per_group * p.expert.tokens + begin, min(kTokens, p.expert.tokens - begin)};
}

// Starts to fill the tiles of x and dout, with mean and rstd; zeros beyond the tile's tokens.
template <typename E, int kRank>
__device__ inline void fetch(const AdapterParams& p, const AdapterBackward& b, const ClusterTile& tile, int column,
                             int buffer, ClusterShared<E, kRank>& shared) {
  using Rows = typename ClusterShared<E, kRank>::Rows;
  const auto take = [&](int row) { return row < tile.tokens; };
  const auto left = [&](int at) { return p.width - at; };
  const auto fill = [&](const AdapterTensor& from, E* to) {
    Rows rows;
    rows.begin(from, from.wide, tile.first, take, column, left, to);
    rows.finish(from, false, false, to, [](int, int, float (&)[kVector]) {});
  };
  Rows direct;
  if (p.x.wide) {
    direct.begin(p.x, true, tile.first, take, column, left, shared.x[buffer]);
  } else {
    fill(p.x, shared.x[buffer]);
  }
  if (b.grad_out.wide) {
    direct.begin(b.grad_out, true, tile.first, take, column, left, shared.grad[buffer]);
  } else {
    fill(b.grad_out, shared.grad[buffer]);
  }
  const int row = thread_of_block();
  if (row < ClusterShared<E, kRank>::kTokens) {
    const bool normed = p.gamma.data != nullptr && take(row);
    shared.mean[buffer][row] = normed ? b.mean[tile.first + row] : 0.0f;
    shared.rstd[buffer][row] = normed ? b.rstd[tile.first + row] : 1.0f;
  }
}

// Wg of the block's columns into shared memory; row sums and biases over all columns. With a barrier of the cluster.
template <typename E, int kRank>
__device__ inline void load_down(const AdapterParams& p, int column, ClusterShared<E, kRank>& shared) {
  typename ClusterShared<E, kRank>::Down down;
  down.open(p, kMergedExpert);
  down.begin(p, column);
  down.finish(p, column, kMergedExpert, shared.down);
  down.store_sums(p, shared.own.s, shared.own.bias, column == 0);
  Cluster::sync();
  const int unit = thread_of_block();
  if (unit < kRank) {
    float s = 0.0f;
    float bias = 0.0f;
    for (int rank = 0; rank < static_cast<int>(Cluster::num_blocks()); ++rank) {
      const UnitTable<kRank>& other = *at_block(&shared.own, rank);
      s += other.s[unit];
      bias += other.bias[unit];
    }
    shared.units.s[unit] = s;
    shared.units.bias[unit] = bias;
  }
}

// This block's part of x Wg^T and dout w_up_e, for all rows of the tile.
template <typename E, int kRank>
__device__ inline void multiply_columns(int buffer, ClusterShared<E, kRank>& shared) {
  using C = ClusterShared<E, kRank>;
  using Rows = typename C::Rows;
  const typename C::First warp;
  Accumulator<E, C::First::kTiles> product;
  product.clear();
  const int row = warp.row() * Rows::kRow;
  if (warp.column() < kRank) {
    product.template multiply<false, true>(shared.x[buffer] + row, Rows::kRow,
                                           shared.down + warp.column() * C::Down::kRow, C::Down::kRow,
                                           kUnit * C::Down::kRow, C::kColumns, false);
  } else {
    product.template multiply<false, false>(shared.grad[buffer] + row, Rows::kRow, shared.up + warp.column() - kRank,
                                            C::Up::kRow, kUnit, C::kColumns, false);
  }
  float* to = shared.exchange.partial + warp.row() * C::kPartialRow + warp.column();
  for (int j = 0; j < C::First::kTiles; ++j) product.store(j, to + j * kUnit, C::kPartialRow);
}

// Adds up the products of the block's share of the rows and gives h, da, c1 and c2 to every block, from the rounded da,
// so that what LayerNorm projects out is gone exactly. Returns the thread's share of <h, dout w_up_e>.
template <typename E, int kRank>
__device__ inline float through_activation(const AdapterParams& p, const ClusterTile& tile, int e, int buffer,
                                           float scale, ClusterShared<E, kRank>& shared) {
  using C = ClusterShared<E, kRank>;
  struct alignas(8) Two {
    float value[2];
  };
  constexpr int kLanes = kRank / 2;  // of a row, with two units each
  constexpr int kTeams = kThreads / kLanes;
  const int blocks = static_cast<int>(Cluster::num_blocks());
  const int team = thread_of_block() / kLanes;
  const int lane = thread_of_block() % kLanes;
  const int unit = 2 * lane;
  const float factor = p.assignment != nullptr ? factor_of(p, e) : 1.0f;
  float dscale = 0.0f;
#pragma unroll 1
  for (int first = 0; first < C::kTokens; first += kTeams * blocks) {
    const int row = first + team * blocks + static_cast<int>(Cluster::block_rank());
    const bool valid = row < tile.tokens;
    float z[2] = {};
    float dh[2] = {};
    float active[2] = {};
    float da[2] = {};
    float pre[2] = {};
    if (valid) {
      for (int rank = 0; rank < blocks; ++rank) {
        const float* from = at_block(shared.exchange.partial, rank) + row * C::kPartialRow + unit;
        const Two down = *reinterpret_cast<const Two*>(from);
        const Two up = *reinterpret_cast<const Two*>(from + kRank);
        for (int n = 0; n < 2; ++n) {
          z[n] += down.value[n];
          dh[n] += up.value[n];
        }
      }
      const Dropout dropout(p, tile.first + row);
      for (int n = 0; n < 2; ++n) {
        pre[n] = shared.rstd[buffer][row] * (z[n] - shared.mean[buffer][row] * shared.units.s[unit + n]);
        const Activated activated = activate(pre[n] + shared.units.bias[unit + n], p.activation);
        const float kept = dropout.factor(unit + n);
        active[n] = kept == 0.0f ? 0.0f : kept * activated.value;
        dscale += active[n] * factor * dh[n];
        da[n] = kept == 0.0f ? 0.0f : kept * scale * (factor * dh[n]) * activated.slope;
      }
    }
    const uint32_t h_bits = pack_pair(active[0], active[1], Element<E>::kDType);
    const uint32_t da_bits = pack_pair(da[0], da[1], Element<E>::kDType);
    float c1 = 0.0f;
    float c2 = 0.0f;
    for (int n = 0; n < 2; ++n) {
      const float rounded = from_bits((da_bits >> (16 * n)) & 0xffffu, Element<E>::kDType);
      c1 += rounded * shared.units.s[unit + n];
      c2 += rounded * pre[n];
    }
    c1 = sum_lanes<kLanes>(c1) / static_cast<float>(p.width);
    c2 = sum_lanes<kLanes>(c2) / static_cast<float>(p.width);
    if (row >= C::kTokens) continue;
    for (int rank = 0; rank < blocks; ++rank) {
      const int at = row * C::Units::kRow + unit;
      *reinterpret_cast<uint32_t*>(at_block(shared.exchange.h, rank) + at) = h_bits;
      *reinterpret_cast<uint32_t*>(at_block(shared.exchange.da, rank) + at) = da_bits;
    }
    if (lane < blocks) {
      at_block(shared.c1, lane)[row] = c1;
      at_block(shared.c2, lane)[row] = c2;
    }
  }
  return dscale;
}

// The block's columns of dx = [dout] + rstd (da Wg - c1 - xhat c2), or [dout] + da w_down without LayerNorm; with it,
// xhat takes the place of x.
template <typename E, int kRank>
__device__ inline void write_dx(const AdapterParams& p, const AdapterBackward& b, const ClusterTile& tile, int column,
                                int buffer, ClusterShared<E, kRank>& shared) {
  using C = ClusterShared<E, kRank>;
  using P = typename C::P;
  const bool norm = p.gamma.data != nullptr;
  const typename C::Second warp;
  const P patch(shared.exchange.patch[warp.warp]);
  Accumulator<E, C::Second::kTiles> y;
  y.clear();
  y.template multiply<false, false>(shared.exchange.da + warp.row() * C::Units::kRow, C::Units::kRow,
                                    shared.down + warp.column(), C::Down::kRow, kUnit, kRank, false);
  float value[P::kCount][kVector];
  patch.spread(y, 0, value);
#pragma unroll
  for (int i = 0; i < P::kCount; ++i) {
    const int row = warp.row() + patch.row(i);
    const int at = warp.column() + patch.column(i);
    E* x = shared.x[buffer] + row * C::Rows::kRow + at;
    float other[kVector];
    if (norm) {
      const float mean = shared.mean[buffer][row];
      const float rstd = shared.rstd[buffer][row];
      get_vector(x, other);
      for (int n = 0; n < kVector; ++n) {
        other[n] = (other[n] - mean) * rstd;
        value[i][n] = rstd * (value[i][n] - shared.c1[row] - other[n] * shared.c2[row]);
      }
      put_vector(x, other);
    }
    if (p.add_input) {
      get_vector(shared.grad[buffer] + row * C::Rows::kRow + at, other);
      for (int n = 0; n < kVector; ++n) value[i][n] += other[n];
    }
    const int count = row < tile.tokens ? p.width - column - at : 0;
    const int64_t index = static_cast<int64_t>(tile.first + row) * p.width + column + at;
    store_vector(b.x.data, p.x.dtype, b.wide_dx, index, count, value[i]);
  }
}

#endif

// gridDim.x: blocks of all clusters. `scale_shares` [gridDim.x] are the blocks' <h, dout w_up_e>.
template <typename E, int kRank>
__global__ void __launch_bounds__(kThreads, 2)
    adapter_backward_cluster_kernel(const __grid_constant__ AdapterParams p, const __grid_constant__ AdapterBackward b,
                                    const __grid_constant__ AdapterParts parts, float* all_parts, float* scale_shares) {
#ifdef MOSA_CLUSTERS
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  using C = ClusterShared<E, kRank>;
  using Weights = typename C::Weights;
  auto& shared = *reinterpret_cast<C*>(dynamic_shared);
  auto& exchange = shared.exchange;
  const float scale = p.scale.data != nullptr ? load_number(p.scale, 0) : p.scale_value;
  const int blocks = static_cast<int>(Cluster::num_blocks());
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  const int64_t tiles = cluster_tiles(p, C::kTokens);
  const int64_t clusters = static_cast<int>(gridDim.x) / blocks;
  const int begin = static_cast<int>(tiles * cluster / clusters);
  const int end = static_cast<int>(tiles * (cluster + 1) / clusters);
  WeightWork work = {};
  work.varied = p.expert.groups > 1 && (p.assignment != nullptr || p.bias_rows > 0);
  work.column = static_cast<int>(Cluster::block_rank()) * C::kColumns;
  work.part = all_parts + cluster * parts.length;

  Accumulator<E, Weights::Warp::kTiles> down_products;
  Accumulator<E, Weights::Warp::kTiles> up_products;
  down_products.clear();
  up_products.clear();
  float sum_da = 0.0f;
  float sum_grad = 0.0f;
  float dscale = 0.0f;
  bool add = false;
  int seen = kNoExpert;  // the expert whose w_up_e is in shared memory
  fetch(p, b, cluster_tile<C::kTokens>(p, begin), work.column, 0, shared);
  load_down(p, work.column, shared);
#pragma unroll 1
  for (int index = begin, buffer = 0;; ++index, buffer ^= 1) {
    const int e = index == end ? kNoExpert : expert_of(p, work.varied ? cluster_tile<C::kTokens>(p, index).first : 0);
    if (e != seen) {
      if (seen != kNoExpert && parts.up) {
        __syncthreads();
        add_up_columns(sum_grad, C::kColumns, shared.weights);
        put_up<false>(p, parts, b, work, seen, add, scale, shared.weights, &up_products);
        up_products.clear();
        sum_grad = 0.0f;
        add = true;
      }
      if (index == end) break;
      __syncthreads();
      typename C::Up up;
      up.open(p, e);
      up.begin(p, work.column);
      up.finish(p, work.column, e, shared.up);
      seen = e;
    }
    wait_for_copies();
    __syncthreads();
    multiply_columns(buffer, shared);
    Cluster::barrier_arrive();
    if (index + 1 < end) {
      fetch(p, b, cluster_tile<C::kTokens>(p, index + 1), work.column, buffer ^ 1, shared);
    }
    sum_grad += share_of_column<C::kColumns, typename C::Rows, C::kTokens>(shared.grad[buffer]);
    Cluster::barrier_wait();
    const ClusterTile tile = cluster_tile<C::kTokens>(p, index);
    dscale += through_activation(p, tile, e, buffer, scale, shared);
    Cluster::sync();
    write_dx(p, b, tile, work.column, buffer, shared);
    sum_da += share_of_column<kRank, typename C::Units, C::kTokens>(exchange.da);
    __syncthreads();
    const typename Weights::Warp warp;
    if (parts.down) {
      down_products.template multiply<true, false>(exchange.da + warp.row(), C::Units::kRow,
                                                   shared.x[buffer] + warp.column(), C::Rows::kRow, kUnit, C::kTokens,
                                                   false);
    }
    if (parts.up) {
      up_products.template multiply<true, false>(exchange.h + warp.row(), C::Units::kRow,
                                                 shared.grad[buffer] + warp.column(), C::Rows::kRow, kUnit, C::kTokens,
                                                 false);
    }
  }
  __syncthreads();
  if (parts.down) {
    add_up_columns(sum_da, kRank, shared.weights);
    put_down<false>(p, parts, work, kMergedExpert, false, shared.weights, &down_products);
  }
  if (b.scale.data != nullptr) {
    __syncthreads();
    add_up_columns(dscale, 1, shared.weights);
    if (thread_of_block() == 0) scale_shares[blockIdx.x] = shared.weights.sums[0];
  }
#endif
}

}  // namespace mosa
