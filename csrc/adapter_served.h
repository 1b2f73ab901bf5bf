// Which kernels serve which tokens: those with lists of units, and those with all.
#pragma once

#include "adapter_launch.h"

namespace mosa {

// Whether the kernels take listed units, and the padded rank that they then have.
inline bool lists_units(const AdapterParams& p) {
  return p.owned.units != nullptr && p.assignment != nullptr && (p.expert.data != nullptr || p.expert.value >= 0);
}
inline int kernel_rank(const AdapterParams& p) { return lists_units(p) ? p.owned.listed : padded_rank(p.rank); }

// Kernels with lists have these units, a third of what there is to compile without them: of fewer experts than r / 64
// that own whole units, all units are multiplied.
constexpr int kFewListed = 32;
constexpr int kMostListed = 64;

// Calls launch.template at<kRank>() for the units that the kernels take.
template <bool kListed, typename Launch>
int for_units(const AdapterParams& p, const Launch& launch) {
  if constexpr (kListed) {
    return p.owned.listed == kFewListed ? launch.template at<kFewListed>() : launch.template at<kMostListed>();
  } else {
    return for_rank(p.rank, launch);
  }
}

// Calls launch.template at<kListed>(params) for all tokens at once; or for those of experts, which have lists, after
// the merged ones, which take all units. Where the id is a number there are no merged tokens beside them.
template <typename Launch>
int for_served(const AdapterParams& params, const Launch& launch) {
  if (!lists_units(params)) return launch.template at<false>(params);
  AdapterParams p = params;
  if (p.expert.data != nullptr) {
    p.served = kServeMerged;
    const int status = launch.template at<false>(p);
    if (status != kOk) return status;
  }
  p.served = kServeExperts;
  return launch.template at<true>(p);
}

}  // namespace mosa
