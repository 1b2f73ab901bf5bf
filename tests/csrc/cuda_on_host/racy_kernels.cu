// Small kernels, each right and with one thing missing that orders its accesses. Prints, a line each, what
// cuda_on_host/races.h says of them.

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <algorithm>
#include <cstdio>

namespace {

constexpr int kThreads = 64;

template <bool kRight>
__global__ void read_after_write(int* out) {
  __shared__ int shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread;
  if (kRight) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - thread];
}

template <bool kRight>
__global__ void write_after_read(int* out) {
  __shared__ int shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (kRight) __syncthreads();
    shared[thread] = turn;
    __syncthreads();
    sum += __shfl_xor_sync(0xffffffffu, shared[kThreads - 1 - thread], 1);
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// A shuffle lets no lane see what another has written.
template <bool kRight>
__global__ void within_a_warp(int* out) {
  __shared__ int shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread;
  if (kRight) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffffu, thread, 1);
  }
  out[thread] = shared[thread ^ 1];
}

// That a whole warp has read does not hold for the other one.
template <bool kRight>
__global__ void read_by_all(int* out) {
  __shared__ int shared[1];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared[0] = 1;
  __syncthreads();
  out[thread] = shared[0];
  if (kRight) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (thread == 0) shared[0] = 2;
}

template <bool kRight>
__global__ void between_blocks(int* out) {
  if (threadIdx.x == 0) out[kRight ? blockIdx.x : 0] = 1;
}

// The last block adds up what all have written.
template <bool kRight>
__global__ void by_ticket(int* out) {
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  unsigned* const ticket = reinterpret_cast<unsigned*>(out + kThreads - 1);
  if (thread == 1) out[blockIdx.x] = 1;
  __syncthreads();
  if (thread == 0) {
    if (kRight) __threadfence();
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || thread != 2) return;
  __threadfence();
  for (unsigned n = 1; n < gridDim.x; ++n) out[0] += out[n];
}

template <bool kRight>
__global__ void asynchronous_copy(int* out) {
  __shared__ __align__(16) int shared[4 * kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  __pipeline_memcpy_async(shared + 4 * thread, out + 4 * thread, 16);
  __pipeline_commit();
  if (kRight) __pipeline_wait_prior(0);
  __syncthreads();
  const int found = shared[4 * (kThreads - 1 - thread)];
  __pipeline_wait_prior(0);
  __syncthreads();
  out[thread] = found;
}

// Nobody knows which lane has which element of a tile.
template <bool kRight>
__global__ void through_a_tile(int* out) {
  using namespace nvcuda;
  __shared__ __align__(32) __half left[256], right[256];
  __shared__ __align__(32) float product[256];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= 32) return;
  for (int i = thread; i < 256; i += 32) left[i] = right[i] = __float2half_rn(1.0f);
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
  if (kRight) __syncwarp();
  wmma::load_matrix_sync(a, left, 16);
  wmma::load_matrix_sync(b, right, 16);
  wmma::fill_fragment(sum, 0.0f);
  wmma::mma_sync(sum, a, b, sum);
  wmma::store_matrix_sync(product, sum, 16, wmma::mem_row_major);
  __syncwarp();
  out[thread] = static_cast<int>(product[8 * thread]);
}

template <bool kRight>
__global__ void within_a_cluster(int* out) {
  using mosa::dynamic_shared;
  int* const shared = reinterpret_cast<int*>(dynamic_shared);
  const auto cluster = cooperative_groups::this_cluster();
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread;
  if (kRight) {
    cluster.sync();
  } else {
    __syncthreads();
  }
  const unsigned other = cluster.block_rank() ^ 1u;
  out[blockIdx.x * kThreads + threadIdx.x] = cluster.map_shared_rank(shared, static_cast<int>(other))[thread];
  cluster.sync();
}

// What is read is not made use of.
template <bool kRight>
__global__ void read_of_what_nobody_wrote(int* out) {
  if (kRight) out[threadIdx.x] = 1;
  const volatile int found = out[threadIdx.x];
  if (found == 2) out[threadIdx.x] = 3;
}

// Neighbours, and one launch after another: nothing to complain of.
template <bool kRight>
__global__ void neighbours(int* out) {
  reinterpret_cast<unsigned char*>(out)[threadIdx.x] = 1;
}

void report(const char* name, bool right, void (*kernel)(int*), unsigned blocks, unsigned cluster = 0, int fill = 0) {
  static int out[4 * kThreads];
  std::fill_n(out, 4 * kThreads, fill);
  cudaLaunchConfig_t config;
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = cluster > 0 ? kThreads * sizeof(int) : 0;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  if (cluster > 0) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<int*>(out));
  std::printf("%s, %s: %s\n", name, right ? "right" : "wrong", error == cudaSuccess ? "-" : cudaGetErrorString(error));
}

}  // namespace

#define REPORT(kernel, ...)                         \
  report(#kernel, true, kernel<true>, __VA_ARGS__); \
  report(#kernel, false, kernel<false>, __VA_ARGS__)

int main() {
  REPORT(read_after_write, 2);
  REPORT(write_after_read, 2);
  REPORT(within_a_warp, 1);
  REPORT(read_by_all, 1);
  REPORT(between_blocks, 3);
  REPORT(by_ticket, 3);
  REPORT(asynchronous_copy, 1);
  REPORT(through_a_tile, 1);
  REPORT(within_a_cluster, 2, 2);
  REPORT(read_of_what_nobody_wrote, 1, 0, cuda_on_host::races::kPoison);
  report("neighbours", true, neighbours<true>, 1);
  report("neighbours", true, neighbours<true>, 1);
}
