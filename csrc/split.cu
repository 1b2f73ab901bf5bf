#include <cuda_runtime.h>

#include "split.h"
#include "split_math.h"
#include "status.h"

namespace mosa {
namespace {

constexpr int kThreads = 256;

// One thread per entry; nothing is read but the seed.
__global__ void __launch_bounds__(kThreads) split_kernel(const __grid_constant__ SplitParams params) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= static_cast<int64_t>(params.rows) * params.columns) return;
  const DrawKey key = draw_key(params.seed != nullptr ? *params.seed : params.seed_value);
  const int64_t i = entry / params.columns, j = entry % params.columns;
  const LineShuffle shuffle = line_shuffle(params, key, split_line(params, i, j));
  uint32_t place = split_unit(params, i, j);
  for (uint32_t round = 0; round < kSplitRounds; ++round) place = shuffle_round(shuffle, round, place);
  params.owner[entry] = owner_at(params, place);
}

}  // namespace

int split_cuda(const SplitParams& params, void* stream) {
  const int status = check_split(params);
  if (status != kOk) return status;
  const int64_t entries = static_cast<int64_t>(params.rows) * params.columns;
  const int64_t blocks = (entries + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) return kTooLarge;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, split_kernel, params);
}

}  // namespace mosa
