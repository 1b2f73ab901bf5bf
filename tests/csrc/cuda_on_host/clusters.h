// Clusters of blocks. Every block has a thread of its own, and so shared memory of its own; they take turns, one at a
// time, in the order of their ranks (every other cluster: backwards). A turn lasts until all fibers of the block wait
// for others, so that whatever no barrier of the cluster orders is seen too early or too late.
//
// Shared memory is full of NaN before its block has begun and must not be touched after it has ended, as on a GPU.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "cuda_runtime.h"

namespace cuda_on_host {

struct Cluster {
  std::vector<Block> blocks;
  std::vector<unsigned char*> shared;  // of each block
  std::vector<bool> finished;
  long arrivals = 0;  // of all threads at its barrier
  std::mutex mutex;
  std::condition_variable changed;
  size_t turn = 0;         // the block that runs, counted in the order in which they take turns
  size_t idle = 0;         // turns in a row in which no fiber came further
  size_t looked_over = 0;  // blocks that have ended and looked at their shared memory
};

inline size_t rank_of_block() { return static_cast<size_t>(block - block->cluster->blocks.data()); }

inline void arrive_at_cluster() {
  const races::Unwatched unwatched;
  if (self().arrived_at_cluster) deadlock("the cluster's barrier, where it has arrived before");
  self().arrived_at_cluster = true;
  ++self().cluster_arrivals;
  ++block->cluster->arrivals;
  block->progress = true;
}

inline void wait_for_cluster() {
  const races::Unwatched unwatched;
  const long target = self().cluster_arrivals;
  if (!self().arrived_at_cluster) deadlock("the cluster's barrier, where it has not arrived");
  self().arrived_at_cluster = false;
  // Nobody arrives anew before all have come, so the sum of arrivals tells.
  const auto threads = static_cast<long>(block->cluster->blocks.size() * block->fibers.size());
  while (block->cluster->arrivals < target * threads) yield();
  self().cluster_waits = target;
  block->progress = true;
}

// The place in the shared memory of another block that `address` is in the shared memory of this one.
inline void* at_block(const void* address, size_t rank) {
  const races::Unwatched unwatched;
  const Cluster& cluster = *block->cluster;
  const auto* own = static_cast<const unsigned char*>(address);
  const unsigned char* begin = cluster.shared[rank_of_block()];
  if (rank >= cluster.blocks.size() || own < begin || own >= begin + block->shared_bytes) {
    std::fprintf(stderr, "block %zu of %zu cannot be asked for address %p, which is not shared\n", rank,
                 cluster.blocks.size(), address);
    std::abort();
  }
  return cluster.shared[rank] + (own - begin);
}

// What the thread of a block does.
inline void run_block_of_cluster(Cluster& cluster, size_t rank, bool backwards) {
  const size_t size = cluster.blocks.size();
  const size_t place = backwards ? size - 1 - rank : rank;
  Block& own = cluster.blocks[rank];
  std::unique_lock<std::mutex> lock(cluster.mutex);
  cluster.shared[rank] = mosa::dynamic_shared;
  cluster.changed.notify_all();
  cluster.changed.wait(lock, [&] {
    for (const unsigned char* shared : cluster.shared) {
      if (shared == nullptr) return false;
    }
    return cluster.turn % size == place;
  });
  fill_shared_memory(own.shared_bytes, kSharedInClusters);
  start(own);
  for (bool busy = true; busy;) {
    bool further = false;
    while ((busy = run_round(own)) && own.progress) further = true;
    cluster.idle = further || !busy ? 0 : cluster.idle + 1;
    if (cluster.idle >= size) deadlock("different barriers of a cluster");
    if (!busy) {
      check_end_of_shared_memory(own, own.shared_bytes, kSharedInClusters, "beyond its end");
      fill_shared_memory(own.shared_bytes, kSharedInClusters);
      cluster.finished[rank] = true;
    }
    do ++cluster.turn;
    while (cluster.finished[(backwards ? size - 1 - cluster.turn % size : cluster.turn % size)] &&
           std::count(cluster.finished.begin(), cluster.finished.end(), false) > 0);
    cluster.changed.notify_all();
    if (busy) cluster.changed.wait(lock, [&] { return cluster.turn % size == place; });
  }
  cluster.changed.wait(lock, [&] { return std::count(cluster.finished.begin(), cluster.finished.end(), false) == 0; });
  check_end_of_shared_memory(own, 0, kSharedInClusters, "after its end");
  ++cluster.looked_over;
  cluster.changed.notify_all();
  cluster.changed.wait(lock, [&] { return cluster.looked_over == size; });
}

inline void run_clusters(const cudaLaunchConfig_t& config, unsigned size, const std::function<void()>& body) {
  const size_t threads = static_cast<size_t>(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  for (unsigned first = 0; first < config.gridDim.x; first += size) {
    Cluster cluster;
    for (unsigned rank = 0; rank < size; ++rank) {
      cluster.blocks.push_back(block_of(config, uint3(first + rank, 0, 0), rank * threads, body));
    }
    const bool backwards = first / size % 2 == 1;
    ++groups;
    for (Block& made : cluster.blocks) {
      made.cluster = &cluster;
      made.group = groups;
      made.backwards = backwards;
    }
    cluster.shared.assign(size, nullptr);
    cluster.finished.assign(size, false);
    std::vector<std::thread> running;
    for (size_t rank = 0; rank < size; ++rank) {
      running.emplace_back([&cluster, rank, backwards] { run_block_of_cluster(cluster, rank, backwards); });
    }
    for (std::thread& thread : running) thread.join();
  }
}

}  // namespace cuda_on_host

// The architecture whose PTX the kernels were made from.
#ifndef CUDA_ON_HOST_PTX
#define CUDA_ON_HOST_PTX 90
#endif
struct cudaFuncAttributes {
  int ptxVersion;
};

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  cuda_on_host::loaded.insert(reinterpret_cast<const void*>(kernel));
  attributes->ptxVersion = CUDA_ON_HOST_PTX;
  return cudaSuccess;
}

// A small device: so few clusters find room at a time that each has several pieces of work.
constexpr int kClustersAtATime = 3;

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  const unsigned size = cuda_on_host::blocks_of_cluster(*config);
  if (size == 0 || size > cuda_on_host::kBlocksOfCluster) return cudaErrorInvalidClusterSize;
  *clusters = kClustersAtATime;
  return cudaSuccess;
}
