// The backward launches that multiply matrices, for one element type.
#pragma once

#include "adapter_backward_weights_kernel.h"
#include "adapter_served.h"

namespace mosa {

template <typename E, bool kListed>
struct LaunchBackwardTokens {
  const AdapterParams& params;
  const AdapterBackward& backward;
  const TokenBuffers& buffers;
  void* stream;

  template <int kRank>
  int at() const {
    const bool wide = backward.grad_out.wide && backward.wide_dx;
    return for_known<E, kRank, kListed>(params, wide, [&](const auto& known) { return with<kRank>(known); });
  }

 private:
  template <int kRank, typename Params>
  int with(const Params& p) const {
    constexpr int kTokens = Step<E, kRank>::kTokens;
    const dim3 blocks(static_cast<unsigned>((p.tokens + kTokens - 1) / kTokens));
    return launch_blocks(adapter_backward_tokens_kernel<E, kRank, kListed, Params>, blocks,
                         sizeof(TokensShared<E, kRank, kListed>), stream, p, backward, buffers);
  }
};

template <typename E, bool kListed>
struct LaunchBackwardWeights {
  const AdapterParams& params;
  const AdapterBackward& backward;
  const TokenBuffers& buffers;
  const AdapterParts& parts;
  float* all_parts;
  void* stream;

  template <int kRank>
  int at() const {
    const dim3 blocks(static_cast<unsigned>(parts.column_blocks), static_cast<unsigned>(parts.number),
                      parts.down && parts.up ? 2u : 1u);
    return launch_blocks(adapter_backward_weights_kernel<E, kRank, kListed>, blocks, sizeof(WeightsShared<E, kRank>),
                         stream, params, backward, buffers, parts, all_parts);
  }
};

template <typename E, bool kListed>
int adapter_backward_in(const AdapterParams& params, const AdapterBackward& backward, const TokenBuffers& buffers,
                        const AdapterParts& parts, float* all_parts, void* stream) {
  const bool weights = parts.down || parts.up;
  if (backward.x.data != nullptr || weights) {
    const LaunchBackwardTokens<E, kListed> tokens = {params, backward, buffers, stream};
    const int status = for_units<kListed>(params, tokens);
    if (status != kOk) return status;
  }
  if (!weights || params.served == kServeMerged) return kOk;  // the kernels with lists sum over all tokens
  return for_units<kListed>(params,
                            LaunchBackwardWeights<E, kListed>{params, backward, buffers, parts, all_parts, stream});
}

}  // namespace mosa
