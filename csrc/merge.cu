#include <cuda_runtime.h>

#include "merge.h"
#include "merge_math.h"
#include "status.h"

namespace mosa {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kUpRows = 16;  // rows of the up-projection per block

// The sum over the block, in a fixed order; valid in thread 0.
__device__ float block_sum(float value) {
  __shared__ float partial[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += partial[warp];
  }
  return sum;
}

// Writes entry (k, i) of out_w_down; returns its share of out_b_down[k].
__device__ float merge_down(const MergeAdapter& a, int k, int i) {
  float down = load_float(a.w_down, a.w_down_dtype, static_cast<int64_t>(k) * a.w_down_stride + i);
  if (a.w_down_init != nullptr && a.down_factor != 1.0f) {
    const int64_t at = static_cast<int64_t>(k) * a.w_down_init_stride + i;
    down = effective_down(down, load_float(a.w_down_init, a.w_down_init_dtype, at), a.down_factor);
  }
  const float gamma = a.gamma != nullptr ? load_float(a.gamma, a.gamma_dtype, i) : 1.0f;
  store_float(a.out_w_down, a.out_dtype, static_cast<int64_t>(k) * a.width + i, down * gamma);
  return a.beta != nullptr ? down * load_float(a.beta, a.beta_dtype, i) : 0.0f;
}

__device__ void merge_up(const MergeAdapter& a, int i, int k, float factor) {
  const float up = load_float(a.w_up, a.w_up_dtype, static_cast<int64_t>(i) * a.w_up_stride + k);
  store_float(a.out_w_up, a.out_dtype, static_cast<int64_t>(i) * a.rank + k, factor * up);
}

__device__ void merge_up_bias(const MergeAdapter& a, int i, float scale) {
  if (a.out_b_up == nullptr) return;
  float sum = 0.0f;
  for (int e = 0; e < a.experts; ++e) {
    sum += load_float(a.b_up, a.b_up_dtype, static_cast<int64_t>(e) * a.b_up_stride + i);
  }
  store_float(a.out_b_up, a.out_dtype, i, merged_up_bias(sum, a.experts, scale));
}

// blockIdx.y is the adapter. Its first `rank` blocks merge a row of the down-projection each, the next ones kUpRows
// rows of the up-projection each, with their biases.
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeParams params) {
  const MergeAdapter& a = params.adapters[blockIdx.y];
  const int block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  if (block < a.rank) {
    float beta_sum = 0.0f;
    for (int i = thread; i < a.width; i += kThreads) beta_sum += merge_down(a, block, i);
    beta_sum = block_sum(beta_sum);
    if (thread == 0) merge_down_bias(a, block, beta_sum);
    return;
  }
  const int first = (block - a.rank) * kUpRows;
  const int rows = min(kUpRows, a.width - first);  // not positive in the blocks that a wider adapter needs
  const float scale = merge_scale(a);
  for (int entry = thread; entry < rows * a.rank; entry += kThreads) {
    merge_up(a, first + entry / a.rank, entry % a.rank, scale * a.up_factor);
  }
  if (thread < rows) merge_up_bias(a, first + thread, scale);
}

}  // namespace

int merge_cuda(const MergeParams& params, void* stream) {
  const int status = check_merge(params);
  if (status != kOk || params.count == 0) return status;
  int blocks = 0;
  for (int n = 0; n < params.count; ++n) {
    const MergeAdapter& a = params.adapters[n];
    blocks = max(blocks, a.rank + (a.width + kUpRows - 1) / kUpRows);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(params.count));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, merge_kernel, params);
}

}  // namespace mosa
