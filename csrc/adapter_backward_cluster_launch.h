// The backward launch by clusters, for one element type.
#pragma once

#include <atomic>

#include "adapter_backward_cluster.h"
#include "adapter_backward_cluster_kernel.h"
#include "adapter_launch.h"

namespace mosa {

constexpr int kFirstWithClusters = 9;  // compute capability
constexpr int kFirstPtxWithClusters = 90;
constexpr int kDevices = 64;  // whose answers are remembered

// Calls launch.template at<kRank>() for the padded rank, which is at most kMostClusterRank.
template <typename Launch>
auto for_cluster_rank(int rank, const Launch& launch) {
  return padded_rank(rank) == 32 ? launch.template at<32>() : launch.template at<64>();
}

inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  return cluster;
}

template <typename E>
struct RoomForClusters {
  int blocks;

  template <int kRank>
  int at() const {
    static std::atomic<int> found[kDevices][kMostClusterBlocks + 1];  // one more than the answer; 0: not asked yet
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
    std::atomic<int>& answer = found[device][blocks];
    if (answer == 0) {
      const int room = ask<kRank>(device);
      if (room < 0) return 0;
      answer = 1 + room;
    }
    return answer - 1;
  }

 private:
  // Negative where the driver could not say, for want of memory or while a graph is captured: it may know later.
  template <int kRank>
  int ask(int device) const {
    int capability = 0;
    int room = 0;
    cudaError_t error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess && capability >= kFirstWithClusters) {
      const auto kernel = adapter_backward_cluster_kernel<E, kRank>;
      // What the driver makes of the PTX of an older architecture has no clusters, and does nothing.
      cudaFuncAttributes code = {};
      error = cudaFuncGetAttributes(&code, kernel);
      if (error == cudaSuccess && code.ptxVersion < kFirstPtxWithClusters) return 0;
      const size_t bytes = sizeof(ClusterShared<E, kRank>);
      cudaLaunchAttribute cluster = cluster_of(blocks);
      cudaLaunchConfig_t config = launch_config(dim3(static_cast<unsigned>(blocks)), bytes, nullptr);
      config.attrs = &cluster;
      config.numAttrs = 1;
      if (error == cudaSuccess) error = static_cast<cudaError_t>(ask_for_shared(kernel, bytes));
      if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&room, kernel, &config);
    }
    if (error == cudaSuccess) return room;
    cudaGetLastError();  // the three launches say it themselves if it matters to them
    return -1;
  }
};

template <typename E>
int room_for_clusters(int rank, int blocks) {
  return for_cluster_rank(rank, RoomForClusters<E>{blocks});
}

template <typename E>
struct LaunchCluster {
  const AdapterParams& params;
  const AdapterBackward& backward;
  const AdapterParts& parts;
  const ClusterPlan& plan;
  float* all_parts;
  float* scale_shares;
  void* stream;

  template <int kRank>
  int at() const {
    const auto kernel = adapter_backward_cluster_kernel<E, kRank>;
    const size_t bytes = sizeof(ClusterShared<E, kRank>);
    const int status = ask_for_shared(kernel, bytes);
    if (status != kOk) return status;
    cudaLaunchAttribute cluster = cluster_of(plan.blocks);
    cudaLaunchConfig_t config = launch_config(dim3(static_cast<unsigned>(plan.number * plan.blocks)), bytes, stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params, backward, parts, all_parts, scale_shares);
  }
};

template <typename E>
int adapter_backward_cluster_in(const AdapterParams& params, const AdapterBackward& backward, const AdapterParts& parts,
                                const ClusterPlan& plan, float* all_parts, float* scale_shares, void* stream) {
  return for_cluster_rank(params.rank,
                          LaunchCluster<E>{params, backward, parts, plan, all_parts, scale_shares, stream});
}

}  // namespace mosa
