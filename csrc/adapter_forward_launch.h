// The forward launch for one element type.
#pragma once

#include "adapter_forward_kernel.h"
#include "adapter_served.h"

namespace mosa {

template <typename E, bool kListed>
struct LaunchForward {
  const AdapterParams& params;
  const AdapterForward& forward;
  void* stream;

  template <int kRank>
  int at() const {
    return for_known<E, kRank, kListed>(params, forward.wide_out,
                                        [&](const auto& known) { return with<kRank>(known); });
  }

 private:
  template <int kRank, typename Params>
  int with(const Params& p) const {
    constexpr int kTokens = Step<E, kRank>::kTokens;
    const dim3 blocks(static_cast<unsigned>((p.tokens + kTokens - 1) / kTokens));
    return launch_blocks(adapter_forward_kernel<E, kRank, kListed, Params>, blocks,
                         sizeof(ForwardShared<E, kRank, kListed>), stream, p, forward);
  }
};

template <typename E, bool kListed>
int adapter_forward_in(const AdapterParams& params, const AdapterForward& forward, void* stream) {
  return for_units<kListed>(params, LaunchForward<E, kListed>{params, forward, stream});
}

}  // namespace mosa
