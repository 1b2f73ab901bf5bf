// The two backward launches that multiply matrices, for one element type.
#pragma once

#include "adapter_backward_weights_kernel.h"
#include "adapter_launch.h"

namespace mosa {

template <typename E>
struct LaunchBackward {
  const AdapterParams& params;
  const AdapterBackward& backward;
  const TokenBuffers& buffers;
  const AdapterParts& parts;
  float* all_parts;
  void* stream;

  template <int kRank>
  int at() const {
    constexpr int kTokens = Step<E, kRank>::kTokens;
    const bool weights = parts.down || parts.up;
    if (backward.x.data != nullptr || weights) {
      const dim3 blocks(static_cast<unsigned>((params.tokens + kTokens - 1) / kTokens));
      const int status = launch_blocks(adapter_backward_tokens_kernel<E, kRank>, blocks, sizeof(TokensShared<E, kRank>),
                                       stream, params, backward, buffers);
      if (status != 0) return status;
    }
    if (!weights) return kOk;
    const dim3 blocks(static_cast<unsigned>(parts.column_blocks), static_cast<unsigned>(parts.number),
                      parts.down && parts.up ? 2u : 1u);
    return launch_blocks(adapter_backward_weights_kernel<E, kRank>, blocks, sizeof(WeightsShared<E, kRank>), stream,
                         params, backward, buffers, parts, all_parts);
  }
};

template <typename E>
int adapter_backward_in(const AdapterParams& params, const AdapterBackward& backward, const TokenBuffers& buffers,
                        const AdapterParts& parts, float* all_parts, void* stream) {
  return for_rank(params.rank, LaunchBackward<E>{params, backward, buffers, parts, all_parts, stream});
}

}  // namespace mosa
