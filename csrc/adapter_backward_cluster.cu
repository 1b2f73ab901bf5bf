// Which calls the backward launch by clusters takes.
#include "adapter_backward_cluster.h"

#include <algorithm>

#include "adapter_backward_cluster_kernel.h"
#include "adapter_launch.h"
#include "adapter_served.h"

namespace mosa {

ClusterPlan cluster_plan_at_most(const AdapterParams& p, const AdapterBackward& b) {
  const AdapterParts parts = adapter_parts(p, b);
  const int tiles = cluster_tiles(p, weight_tokens<__half>(padded_rank(p.rank)));
  const int most = kBackwardBlocksPerMultiprocessor * b.multiprocessors / parts.column_blocks;
  const bool taken = b.one_launch && b.x.data != nullptr && (parts.down || parts.up) &&
                     // x and dout go to the matrix units as they lie in memory
                     p.product_dtype != kFloat32 && p.x.dtype == p.product_dtype &&
                     // Wg, its row sums and its gradient are those of one expert from the first tile to the last
                     p.assignment_down == nullptr && !lists_units(p) &&
                     // what fits on chip
                     p.rank <= kMostClusterRank && parts.column_blocks <= kMostClusterBlocks;
  return {parts.column_blocks, taken ? std::clamp(most, 1, tiles) : 0};
}

ClusterPlan cluster_plan(const AdapterParams& p, const AdapterBackward& b) {
  ClusterPlan plan = cluster_plan_at_most(p, b);
  if (plan.number == 0) return plan;
  const int room = p.product_dtype == kFloat16 ? room_for_clusters<__half>(p.rank, plan.blocks)
                                               : room_for_clusters<__nv_bfloat16>(p.rank, plan.blocks);
  plan.number = std::min(plan.number, room);
  return plan;
}

bool adapter_backward_in_one_launch(const AdapterParams& params, const AdapterBackward& backward) {
  AdapterParams p = params;
  return prepare_adapter(&p) == kOk && cluster_plan(p, backward).number > 0;
}

}  // namespace mosa
