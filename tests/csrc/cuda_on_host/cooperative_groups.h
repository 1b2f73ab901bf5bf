// The cluster of CUDA's header.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned num_blocks() { return static_cast<unsigned>(cuda_on_host::block->cluster->blocks.size()); }
  static unsigned block_rank() { return static_cast<unsigned>(cuda_on_host::rank_of_block()); }
  static void barrier_arrive() { cuda_on_host::arrive_at_cluster(); }
  static void barrier_wait() { cuda_on_host::wait_for_cluster(); }
  static void sync() {
    barrier_arrive();
    barrier_wait();
  }
  template <typename T>
  static T* map_shared_rank(T* address, int rank) {
    return static_cast<T*>(cuda_on_host::at_block(address, static_cast<size_t>(rank)));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
