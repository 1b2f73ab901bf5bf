// Where the backward pass takes one launch by clusters of blocks: the choice, and the launch.
#pragma once

#include "adapter.h"

namespace mosa {

// A launch of `number` clusters of `blocks` blocks each; number 0: other launches take the call.
struct ClusterPlan {
  int blocks;
  int number;
};

// The most that any device with as many multiprocessors would be given; looks at no device.
ClusterPlan cluster_plan_at_most(const AdapterParams& params, const AdapterBackward& backward);

// On the current device. Both plans are for params that prepare_adapter has seen.
ClusterPlan cluster_plan(const AdapterParams& params, const AdapterBackward& backward);

// For one type of the products' operands; each is instantiated in a file of its own. How many clusters of as many
// blocks find room at a time on the current device: 0 where it has none.
template <typename E>
int room_for_clusters(int rank, int blocks);

// `scale_shares` [blocks of all clusters]: what the blocks have found of the gradient of the scale.
template <typename E>
int adapter_backward_cluster_in(const AdapterParams& params, const AdapterBackward& backward, const AdapterParts& parts,
                                const ClusterPlan& plan, float* all_parts, float* scale_shares, void* stream);

}  // namespace mosa
