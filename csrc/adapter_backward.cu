// The parts of the weight gradients: how they are laid out, and the launch that adds them up.
#include <algorithm>

#include "adapter_backward_cluster.h"
#include "adapter_backward_weights_kernel.h"
#include "adapter_served.h"

namespace mosa {

namespace {

constexpr int kTile = 32;  // columns and units that a block of the last launch transposes

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sum of one number of every part, in the order of the parts.
__device__ float sum_parts(const float* from, const AdapterParts& parts) {
  float total = 0.0f;
  float excess = 0.0f;
#pragma unroll 8
  for (int left = parts.number; left > 0; --left, from += parts.length) add_exactly(*from, total, excess);
  return total;
}

__device__ void put(const AdapterGradient& to, int64_t index, float value) {
  if (to.data != nullptr) store_number(to.data, to.dtype, index, value);
}

// blockIdx.y: 0 for w_down, 1 for w_up, 2 for the vectors, the scale and the activity.
__global__ void __launch_bounds__(kThreads)
    adapter_backward_reduce_kernel(const __grid_constant__ AdapterParams p, const __grid_constant__ AdapterBackward b,
                                   const __grid_constant__ AdapterParts parts, const float* all_parts,
                                   const float* token_scale, int token_blocks) {
  __shared__ float tile[kTile][kTile + 1];
  __shared__ float shares[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t block = blockIdx.x;
  const int64_t size = static_cast<int64_t>(p.width) * p.rank;
  if (blockIdx.y == 0) {
    const int64_t index = block * kThreads + thread;
    if (parts.down && b.w_down.data != nullptr && index < size)
      put(b.w_down, index, sum_parts(all_parts + index, parts));
  } else if (blockIdx.y == 1) {
    if (!parts.up || b.w_up.data == nullptr) return;
    const int unit_blocks = (p.rank + kTile - 1) / kTile;
    const int first_column = static_cast<int>(block / unit_blocks) * kTile;
    const int first_unit = static_cast<int>(block % unit_blocks) * kTile;
    if (first_column >= p.width) return;
    const float* from = all_parts + parts.begin_up;
    for (int i = thread / kTile; i < kTile; i += kThreads / kTile) {
      const int unit = first_unit + i;
      const int column = first_column + thread % kTile;
      const bool inside = unit < p.rank && column < p.width;
      tile[i][thread % kTile] = inside ? sum_parts(from + static_cast<int64_t>(unit) * p.width + column, parts) : 0.0f;
    }
    __syncthreads();
    for (int i = thread / kTile; i < kTile; i += kThreads / kTile) {
      const int column = first_column + i;
      const int unit = first_unit + thread % kTile;
      if (unit < p.rank && column < p.width) {
        put(b.w_up, static_cast<int64_t>(column) * p.rank + unit, tile[thread % kTile][i]);
      }
    }
  } else {
    const int64_t index = parts.begin_gamma + block * kThreads + thread;
    if (index < parts.begin_b_up) {
      const bool is_gamma = index < parts.begin_beta;
      const AdapterGradient& to = is_gamma ? b.gamma : b.beta;
      if (to.data != nullptr) {
        put(to, index - (is_gamma ? parts.begin_gamma : parts.begin_beta), sum_parts(all_parts + index, parts));
      }
    } else if (index < parts.begin_b_down) {
      if (b.b_up.data != nullptr) put(b.b_up, index - parts.begin_b_up, sum_parts(all_parts + index, parts));
    } else if (index < parts.begin_scale) {
      if (b.b_down.data != nullptr) put(b.b_down, index - parts.begin_b_down, sum_parts(all_parts + index, parts));
    }
    if (b.scale.data != nullptr && block == 0) {
      float share = 0.0f;
      for (int i = thread; i < token_blocks; i += kThreads) share += token_scale[i];
      for (int i = thread; i < parts.column_blocks; i += kThreads) {
        share += sum_parts(all_parts + parts.begin_scale + i, parts);
      }
      shares[thread] = share;
      __syncthreads();
      if (thread == 0) {
        float total = 0.0f;
        for (int i = 0; i < kThreads; ++i) total += shares[i];
        put(b.scale, 0, total);
      }
    }
    if (b.activity != nullptr && block == 0) {
      for (int n = thread; n < b.activity_rows; n += kThreads) {
        bool ran = false;
        for (int group = 0; group < p.expert.groups; ++group) {
          const int e = expert_of(p, group * p.expert.tokens);
          ran = ran || e < 0 || e == n;
        }
        b.activity[n] = ran ? 1.0f : 0.0f;
      }
    }
  }
}

// Blocks of the launches over tokens.
int token_blocks(const AdapterParams& p) {
  const int blocks = token_blocks_of(p, kernel_rank(p));
  return lists_units(p) && p.expert.data != nullptr ? blocks + token_blocks_of(p, padded_rank(p.rank)) : blocks;
}

int launch_reduce(const AdapterParams& p, const AdapterBackward& b, const AdapterParts& parts, const float* all_parts,
                  const float* token_scale, int token_blocks, void* stream) {
  const int64_t size = static_cast<int64_t>(p.width) * p.rank;
  int64_t blocks = std::max<int64_t>(1, divide_up(parts.begin_scale - parts.begin_gamma, kThreads));
  if (parts.down) blocks = std::max(blocks, divide_up(size, kThreads));
  if (parts.up) blocks = std::max(blocks, divide_up(p.width, kTile) * divide_up(p.rank, kTile));
  return launch_blocks(adapter_backward_reduce_kernel, dim3(static_cast<unsigned>(blocks), 3), 0, stream, p, b, parts,
                       all_parts, token_scale, token_blocks);
}

struct Products {
  const AdapterBackward& backward;
  const TokenBuffers& buffers;
  const AdapterParts& parts;
  float* all_parts;
  void* stream;

  template <bool kListed>
  int at(const AdapterParams& p) const {
    TokenBuffers own = buffers;  // the blocks of merged tokens come after those of the others
    if (p.served == kServeMerged && own.scale != nullptr) own.scale += token_blocks_of(p, kernel_rank(p));
    switch (p.product_dtype) {
      case kFloat16:
        return adapter_backward_in<__half, kListed>(p, backward, own, parts, all_parts, stream);
      case kBFloat16:
        return adapter_backward_in<__nv_bfloat16, kListed>(p, backward, own, parts, all_parts, stream);
      default:
        return adapter_backward_in<float, kListed>(p, backward, own, parts, all_parts, stream);
    }
  }
};

int64_t token_buffer_bytes(const AdapterParams& p) {
  return static_cast<int64_t>(p.tokens) * padded_rank(p.rank) * (p.product_dtype == kFloat32 ? 4 : 2);
}

// Everything in one launch, and one that adds up the clusters' parts.
template <typename E>
int launch_cluster(const AdapterParams& p, const AdapterBackward& b, AdapterParts parts, const ClusterPlan& plan,
                   void* stream) {
  parts.number = plan.number;
  float* all_parts = static_cast<float*>(b.workspace);
  float* scale_shares = all_parts + parts.number * parts.length;
  const int code = adapter_backward_cluster_in<E>(p, b, parts, plan, all_parts, scale_shares, stream);
  if (code != kOk) return code;
  return launch_reduce(p, b, parts, all_parts, scale_shares, plan.number * plan.blocks, stream);
}

int64_t cluster_bytes(const AdapterParams& p, const AdapterBackward& b, const AdapterParts& parts) {
  const ClusterPlan plan = cluster_plan_at_most(p, b);
  return plan.number * (parts.length + plan.blocks) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

AdapterParts adapter_parts(const AdapterParams& p, const AdapterBackward& b) {
  AdapterParts parts = {};
  parts.down =
      b.w_down.data != nullptr || b.b_down.data != nullptr || b.gamma.data != nullptr || b.beta.data != nullptr;
  parts.up = b.w_up.data != nullptr || b.b_up.data != nullptr || b.scale.data != nullptr;
  const int64_t step =
      p.product_dtype == kFloat32 ? weight_tokens<float>(kernel_rank(p)) : weight_tokens<__half>(kernel_rank(p));
  parts.column_blocks = static_cast<int32_t>(divide_up(p.width, weight_columns(kernel_rank(p))));
  const int64_t runs = divide_up(p.tokens, step);
  const int64_t blocks = static_cast<int64_t>(kBackwardBlocksPerMultiprocessor) * std::max(b.multiprocessors, 1);
  const int64_t per_part = static_cast<int64_t>(parts.column_blocks) * std::max(1, int{parts.down} + int{parts.up});
  const int64_t number = std::clamp<int64_t>(blocks / per_part, 1, runs);
  parts.tokens = static_cast<int32_t>(divide_up(runs, number) * step);
  parts.number = static_cast<int32_t>(divide_up(p.tokens, parts.tokens));

  const int64_t size = static_cast<int64_t>(p.width) * p.rank;
  const int64_t norm = p.gamma.data != nullptr ? p.width : 0;
  const int64_t biases = p.b_up.data == nullptr ? 0 : static_cast<int64_t>(std::max(p.bias_rows, 1)) * p.width;
  parts.begin_up = parts.down ? size : 0;
  parts.begin_gamma = parts.begin_up + (parts.up ? size : 0);
  parts.begin_beta = parts.begin_gamma + norm;
  parts.begin_b_up = parts.begin_beta + norm;
  parts.begin_b_down = parts.begin_b_up + biases;
  parts.begin_scale = parts.begin_b_down + p.rank;
  parts.length = divide_up(parts.begin_scale + parts.column_blocks, 4) * 4;  // every part begins at 16 bytes
  return parts;
}

int64_t adapter_backward_workspace(const AdapterParams& params, const AdapterBackward& b) {
  AdapterParams p = params;
  if (prepare_adapter(&p) != kOk) return 0;
  const AdapterParts parts = adapter_parts(p, b);
  if (!parts.down && !parts.up) return 0;
  const int64_t in_turn =
      2 * token_buffer_bytes(p) + (parts.number * parts.length + token_blocks(p)) * static_cast<int64_t>(sizeof(float));
  return std::max(in_turn, cluster_bytes(p, b, parts));
}

int adapter_backward(const AdapterParams& params, const AdapterBackward& backward, void* stream) {
  AdapterParams p = params;
  AdapterBackward b = backward;
  const int status = prepare_adapter(&p);
  if (status != kOk) return status;
  if (b.grad_out.data == nullptr) return kMissingPointer;
  if (b.grad_out.dtype != p.x.dtype) return kOtherDType;
  if (p.gamma.data != nullptr && (b.mean == nullptr || b.rstd == nullptr)) return kMissingPointer;
  b.grad_out.wide = is_wide(b.grad_out.data, b.grad_out.stride, b.grad_out.dtype);
  b.wide_dx = is_wide(b.x.data, p.width, p.x.dtype);

  const AdapterParts parts = adapter_parts(p, b);
  TokenBuffers buffers = {};
  float* all_parts = nullptr;
  if (parts.down || parts.up) {
    if (b.workspace == nullptr || b.workspace_bytes < adapter_backward_workspace(p, b)) return kSmallWorkspace;
    buffers.h = b.workspace;
    buffers.da = static_cast<char*>(b.workspace) + token_buffer_bytes(p);
    all_parts = reinterpret_cast<float*>(static_cast<char*>(b.workspace) + 2 * token_buffer_bytes(p));
    buffers.scale = all_parts + parts.number * parts.length;
    buffers.stride = padded_rank(p.rank);
  }
  const ClusterPlan plan = cluster_plan(p, b);
  if (plan.number > 0) {
    return p.product_dtype == kFloat16 ? launch_cluster<__half>(p, b, parts, plan, stream)
                                       : launch_cluster<__nv_bfloat16>(p, b, parts, plan, stream);
  }
  const int code = for_served(p, Products{b, buffers, parts, all_parts, stream});
  if (code != kOk || all_parts == nullptr) return code;
  return launch_reduce(p, b, parts, all_parts, buffers.scale, token_blocks(p), stream);
}

}  // namespace mosa
