// Stands in for the CUDA runtime, so that g++ compiles an unchanged .cu file and runs its kernels on the CPU.
//
// Every CUDA thread of a block is a fiber with its own stack. Fibers run one at a time, in the order of their thread
// index (every other block: backwards, so that a race is lost by either side), until they reach a barrier or a
// warp-wide operation; there they yield until all that take part have come. A kernel that reads what a later thread
// writes without a barrier in between therefore sees stale values, and a barrier that some thread never reaches is
// reported as a deadlock. Blocks run one after the other, each on shared memory full of NaN, and the dynamic part ends
// where the launch said. clusters.h runs the blocks of a cluster together.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "bytes.h"
#include "races.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time on a thread, so what a block shares may be static to it; `extern` may stand before it too.
#define __shared__ thread_local
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(size)
#endif

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;

struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorInvalidClusterSize = 912;
using cudaStream_t = void*;

// One device, which is always current.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
constexpr cudaError_t kRaceFound = 100001;
inline const char* cudaGetErrorName(cudaError_t error) {
  if (error == kRaceFound) return "race";
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "an error";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == kRaceFound) return cuda_on_host::races::found();
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no text on the host";
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Shared memory of a block: what it may have by itself, and when it asks on the device that has the least, a T4; with
// clusters on the first that knows them, an H100.
constexpr size_t kSharedByItself = 48 * 1024;
constexpr size_t kSharedAtMost = 64 * 1024;
constexpr size_t kSharedInClusters = 227 * 1024;
constexpr size_t kFence = 128;  // bytes behind its end that no block may write
namespace mosa {
inline thread_local __align__(128) unsigned char dynamic_shared[kSharedInClusters + kFence];
}  // namespace mosa

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace cuda_on_host {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kBlocksOfCluster = 8;  // that every GPU with clusters takes

struct Copy {
  void* to;
  const void* from;
  size_t size;
  size_t zeros;  // at the end, in place of what stands there
};

struct Fiber {
  ucontext_t context;
  char* stack;
  uint3 index;
  bool done = false;
  // The barrier at which it waits, counted from the start of the block: one count per kind of barrier.
  long block_barriers = 0;
  long warp_barriers = 0;
  long cluster_arrivals = 0;
  long warp_orders = 0;                   // of the barriers of its warp, those that order accesses to memory
  long cluster_waits = 0;                 // at the barrier of the cluster that have ended
  bool fenced = false;                    // since its last atomic operation
  bool arrived_at_cluster = false;        // and not waited yet
  uint64_t exchanged = 0;                 // what it offers to its warp
  std::vector<std::vector<Copy>> copies;  // that it has started and not waited for, by commit; the last is open
};

// Threads that meet again and again.
struct Barrier {
  long meetings = 0;   // at which all have come
  size_t waiting = 0;  // for the others to come to the next one
};

struct Cluster;

struct Block {
  std::vector<Fiber> fibers;
  uint3 index;
  bool backwards = false;
  Cluster* cluster = nullptr;
  uint64_t group = 0;  // a number that blocks of a cluster share, and no others
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  size_t ended = 0;  // fibers
  ucontext_t scheduler;
  size_t current = 0;
  bool progress = false;  // whether any fiber came further in this round
  std::function<void()> body;
};

inline Block* block = nullptr;

inline Fiber& self() { return block->fibers[block->current]; }

inline void yield() { swapcontext(&self().context, &block->scheduler); }

[[noreturn]] inline void deadlock(const char* where) {
  std::fprintf(stderr, "deadlock: thread %zu of block (%u, %u) waits at %s for threads that never come\n",
               block->current, blockIdx.x, blockIdx.y, where);
  std::abort();
}

// Waits until every fiber in [first, last) has come to this barrier as often as this one.
inline void wait(size_t first, size_t last, Barrier& barrier, long Fiber::* count, const char* where) {
  const long target = ++(self().*count);
  block->progress = true;
  if (++barrier.waiting == last - first) {
    barrier.waiting = 0;
    barrier.meetings = target;
    return;
  }
  while (barrier.meetings < target) {
    for (size_t i = first; block->ended > 0 && i < last; ++i) {
      const Fiber& other = block->fibers[i];
      if (other.done && other.*count < target) deadlock(where);
    }
    yield();
  }
}

inline std::pair<size_t, size_t> warp_of(size_t thread) {
  const size_t first = thread / kWarpSize * kWarpSize;
  return {first, std::min(first + kWarpSize, block->fibers.size())};
}

inline void wait_for_warp(const char* where) {
  const auto [first, last] = warp_of(block->current);
  wait(first, last, block->warp_barriers[first / kWarpSize], &Fiber::warp_barriers, where);
}

// The value that `lane` of this warp offers; every lane of the warp has to take part.
template <typename T>
T exchange(T value, int lane) {
  const races::Unwatched unwatched;
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
  std::memcpy(&self().exchanged, &value, sizeof(T));
  wait_for_warp("a warp shuffle");
  const auto [first, last] = warp_of(block->current);
  T result = value;
  if (lane >= 0 && first + static_cast<size_t>(lane) < last) {
    std::memcpy(&result, &block->fibers[first + static_cast<size_t>(lane)].exchanged, sizeof(T));
  }
  wait_for_warp("a warp shuffle");  // nobody offers anew before all have read
  return result;
}

inline void fiber_main() {
  races::watch(true);
  block->body();
  races::watch(false);
  self().done = block->progress = true;
  ++block->ended;
  swapcontext(&self().context, &block->scheduler);
}

inline void start(Fiber& fiber) {
  fiber.done = fiber.arrived_at_cluster = false;
  fiber.block_barriers = fiber.warp_barriers = fiber.cluster_arrivals = fiber.warp_orders = fiber.cluster_waits = 0;
  fiber.fenced = false;
  fiber.copies.assign(1, {});
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

inline void start(Block& running) {
  running.barrier = Barrier();
  running.warp_barriers.assign((running.fibers.size() + kWarpSize - 1) / kWarpSize, Barrier());
  running.ended = 0;
  std::for_each(running.fibers.begin(), running.fibers.end(), [](Fiber& fiber) { start(fiber); });
}

// Lets every fiber run until it waits; false where all are done.
inline bool run_round(Block& running) {
  block = &running;
  blockIdx = running.index;
  bool busy = running.progress = false;
  for (size_t turn = 0; turn < running.fibers.size(); ++turn) {
    const size_t i = running.backwards ? running.fibers.size() - 1 - turn : turn;
    if (running.fibers[i].done) continue;
    running.current = i;
    threadIdx = running.fibers[i].index;
    swapcontext(&running.scheduler, &running.fibers[i].context);
    busy = true;
  }
  return busy;
}

inline void run_block(Block& running) {
  start(running);
  while (run_round(running)) {
    if (!running.progress) deadlock("different barriers");
  }
}

// Stacks outlive a launch: to map fresh ones takes longer than many a kernel.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

inline uint64_t groups = 0;  // of all launches

// Bytes of dynamic shared memory that each kernel has asked for.
inline std::map<const void*, size_t> asked_for;

// Of the thread that calls; `most` bytes are looked after, of which the block has asked for `bytes`.
inline void fill_shared_memory(size_t bytes, size_t most) {
  ASAN_UNPOISON_MEMORY_REGION(mosa::dynamic_shared, sizeof(mosa::dynamic_shared));
  std::memset(mosa::dynamic_shared, 0xff, most + kFence);
  ASAN_POISON_MEMORY_REGION(mosa::dynamic_shared + bytes, sizeof(mosa::dynamic_shared) - bytes);
}

inline void check_end_of_shared_memory(const Block& running, size_t bytes, size_t most, const char* what) {
  ASAN_UNPOISON_MEMORY_REGION(mosa::dynamic_shared, sizeof(mosa::dynamic_shared));
  for (size_t i = bytes; i < most + kFence; ++i) {
    if (mosa::dynamic_shared[i] == 0xff) continue;
    std::fprintf(stderr, "block (%u, %u): byte %zu of %zu bytes of shared memory was written %s\n", running.index.x,
                 running.index.y, i, bytes, what);
    std::abort();
  }
}

inline Block block_of(const cudaLaunchConfig_t& config, uint3 index, size_t first_stack, std::function<void()> body) {
  const dim3& size = config.blockDim;
  Block made;
  made.index = index;
  made.shared_bytes = config.dynamicSmemBytes;
  made.body = std::move(body);
  made.fibers = std::vector<Fiber>(static_cast<size_t>(size.x) * size.y * size.z);
  for (size_t i = 0; i < made.fibers.size(); ++i) {
    const unsigned n = static_cast<unsigned>(i);
    made.fibers[i].stack = stack_of(first_stack + i);
    made.fibers[i].index = uint3(n % size.x, n / size.x % size.y, n / (size.x * size.y));
  }
  return made;
}

// Blocks of a cluster; 0 for a launch without clusters.
inline unsigned blocks_of_cluster(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return size.x * size.y * size.z;
  }
  return 0;
}

inline void run_clusters(const cudaLaunchConfig_t& config, unsigned size, const std::function<void()>& body);

// Kernels that have been launched, or loaded without.
inline std::set<const void*> loaded;

template <typename Kernel, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t& config, Kernel* kernel, const Arguments&... arguments) {
  const size_t threads = static_cast<size_t>(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const size_t blocks = static_cast<size_t>(config.gridDim.x) * config.gridDim.y * config.gridDim.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || config.gridDim.y > 65535 || config.gridDim.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = asked_for.find(reinterpret_cast<const void*>(kernel));
  const size_t allowed = asked == asked_for.end() ? kSharedByItself : std::max(kSharedByItself, asked->second);
  const unsigned cluster = blocks_of_cluster(config);
  const size_t most = cluster > 0 ? kSharedInClusters : kSharedAtMost;
  if (config.dynamicSmemBytes > std::min(allowed, most)) return cudaErrorInvalidValue;
  const std::function<void()> body = [&] { kernel(arguments...); };
  loaded.insert(reinterpret_cast<const void*>(kernel));
  races::begin_launch();
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  if (cluster > 0) {
    if (cluster > kBlocksOfCluster || gridDim.x % cluster != 0 || gridDim.y * gridDim.z != 1) {
      return cudaErrorInvalidClusterSize;
    }
    run_clusters(config, cluster, body);
    block = nullptr;
    return races::found() == nullptr ? cudaSuccess : kRaceFound;
  }
  Block running = block_of(config, blockIdx, 0, body);
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        running.index = uint3(x, y, z);
        running.group = ++groups;
        running.backwards = (x + y) % 2 == 1;
        fill_shared_memory(config.dynamicSmemBytes, most);
        run_block(running);
        check_end_of_shared_memory(running, config.dynamicSmemBytes, most, "beyond its end");
      }
    }
  }
  block = nullptr;
  return races::found() == nullptr ? cudaSuccess : kRaceFound;
}

}  // namespace cuda_on_host

// For tests.
extern "C" {
__attribute__((visibility("default"), used)) inline size_t cuda_on_host_loaded() { return cuda_on_host::loaded.size(); }
__attribute__((visibility("default"), used)) inline void cuda_on_host_unload() { cuda_on_host::loaded.clear(); }
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_host::launch(*config, kernel, arguments...);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > kSharedInClusters) return cudaErrorInvalidValue;
  cuda_on_host::asked_for[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

[[noreturn]] inline void __trap() { std::abort(); }

inline void __syncthreads() {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::Block& own = *cuda_on_host::block;
  cuda_on_host::wait(0, own.fibers.size(), own.barrier, &cuda_on_host::Fiber::block_barriers, "__syncthreads");
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const int lane = static_cast<int>(cuda_on_host::block->current % cuda_on_host::kWarpSize);
  return cuda_on_host::exchange(value, lane + static_cast<int>(delta));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = static_cast<int>(cuda_on_host::block->current % cuda_on_host::kWarpSize);
  return cuda_on_host::exchange(value, lane ^ mask);
}

inline void __syncwarp(unsigned = 0xffffffffu) {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::wait_for_warp("__syncwarp");
  ++cuda_on_host::self().warp_orders;
}

#include "atomics.h"
#include "clusters.h"
