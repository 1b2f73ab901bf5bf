// How the launchers choose and start a kernel.
#pragma once

#include <cuda_runtime.h>

#include "adapter.h"
#include "adapter_project.h"
#include "status.h"

namespace mosa {

// What a rank is padded to: each has its own kernels.
constexpr int padded_rank(int rank) { return rank <= 32 ? 32 : rank <= 64 ? 64 : rank <= 128 ? 128 : 256; }

// Calls launch.template at<kRank>() for the padded rank.
template <typename Launch>
int for_rank(int rank, const Launch& launch) {
  switch (padded_rank(rank)) {
    case 32:
      return launch.template at<32>();
    case 64:
      return launch.template at<64>();
    case 128:
      return launch.template at<128>();
    default:
      return launch.template at<256>();
  }
}

template <typename E>
struct TokensOfBlock {
  template <int kRank>
  int at() const {
    return Step<E, kRank>::kTokens;
  }
};

// Blocks of a launch over tokens with kernels of this rank.
inline int token_blocks_of(const AdapterParams& p, int rank) {
  const int tokens =
      p.product_dtype == kFloat32 ? for_rank(rank, TokensOfBlock<float>()) : for_rank(rank, TokensOfBlock<__half>());
  return (p.tokens + tokens - 1) / tokens;
}

constexpr int kBackwardBlocksPerMultiprocessor = 2;  // that the kernels with weight gradients are split into
constexpr size_t kSharedWithoutAsking = 48 * 1024;   // bytes; above, a kernel has to ask

template <typename... Parameters>
int ask_for_shared(void (*kernel)(Parameters...), size_t bytes) {
  if (bytes <= kSharedWithoutAsking) return kOk;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

inline cudaLaunchConfig_t launch_config(dim3 blocks, size_t shared_bytes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

template <typename... Parameters, typename... Arguments>
int launch_blocks(void (*kernel)(Parameters...), dim3 blocks, size_t shared_bytes, void* stream,
                  const Arguments&... arguments) {
  if (stream == load_only()) {
    cudaFuncAttributes ignored = {};
    return cudaFuncGetAttributes(&ignored, kernel);
  }
  const int status = ask_for_shared(kernel, shared_bytes);
  if (status != kOk) return status;
  const cudaLaunchConfig_t config = launch_config(blocks, shared_bytes, stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline bool is_wide(const void* data, int64_t stride, uint8_t dtype) {
  const int64_t bytes = stride * (dtype == kFloat32 ? 4 : 2);
  return reinterpret_cast<uintptr_t>(data) % kWideBytes == 0 && bytes % kWideBytes == 0;
}

// For one type of the products' operands; each is instantiated in a file of its own.
template <typename E, bool kListed>
int adapter_forward_in(const AdapterParams& params, const AdapterForward& forward, void* stream);
template <typename E, bool kListed>
int adapter_backward_in(const AdapterParams& params, const AdapterBackward& backward, const TokenBuffers& buffers,
                        const AdapterParts& parts, float* all_parts, void* stream);

}  // namespace mosa
