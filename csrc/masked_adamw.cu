#include "masked_adamw.h"

#include <cuda_runtime.h>

#include "masked_adamw_math.h"

namespace mosa {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;  // entries per thread: one access of 16 bytes in 16 bits, two in 32
constexpr uint32_t kBlockEntries = kThreads * kRun;
constexpr uintptr_t kAlignment = 16;

struct alignas(kAlignment) Vector {
  uint32_t words[4];
};

// A run of entries as they lie in memory, so that what stands still is written back bit by bit.
template <uint8_t kType>
struct Run {
  static constexpr int kEntryBytes = kType == kFloat32 ? 4 : 2;
  static constexpr int kVectors = kRun * kEntryBytes / static_cast<int>(sizeof(Vector));
  Vector vectors[kVectors];

  __device__ void load(const void* data, uint32_t first) {
    const Vector* from = static_cast<const Vector*>(data) + first / kRun * kVectors;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) vectors[n] = from[n];
  }
  __device__ void store(void* data, uint32_t first) const {
    Vector* to = static_cast<Vector*>(data) + first / kRun * kVectors;
#pragma unroll
    for (int n = 0; n < kVectors; ++n) to[n] = vectors[n];
  }
  __device__ float get(int n) const {
    const uint32_t word = vectors[n * kEntryBytes / 16].words[n * kEntryBytes % 16 / 4];
    if (kType == kFloat32) return bits_to_float(word);
    const uint16_t half = static_cast<uint16_t>(word >> (n % 2 * 16));
    return kType == kFloat16 ? float16_to_float(half) : bfloat16_to_float(half);
  }
  __device__ void set(int n, float value) {
    uint32_t& word = vectors[n * kEntryBytes / 16].words[n * kEntryBytes % 16 / 4];
    if (kType == kFloat32) {
      word = float_to_bits(value);
    } else {
      const uint32_t half = kType == kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
      const int shift = n % 2 * 16;
      word = (word & ~(0xffffu << shift)) | half << shift;
    }
  }
};

__device__ inline double learning_rate(const AdamWOptions& options) {
  if (options.lr == nullptr) return options.lr_value;
  return options.lr_is_double ? *static_cast<const double*>(options.lr) : *static_cast<const float*>(options.lr);
}

// The moves of the entries [first, first + count) of a tensor; entries without an expert stand still.
__device__ inline void moves_of_run(const AdamWTensor& t, uint32_t first, int count, const AdamWMove* table,
                                    AdamWMove (&run)[kRun]) {
  if (t.owner != nullptr) {
    uint8_t owners[kRun] = {0};
    if (t.vectors && count == kRun) {
      uint64_t eight = *reinterpret_cast<const uint64_t*>(t.owner + first);
#pragma unroll
      for (int n = 0; n < kRun; ++n) owners[n] = static_cast<uint8_t>(eight >> (8 * n));
    } else {
      for (int n = 0; n < count; ++n) owners[n] = t.owner[first + static_cast<uint32_t>(n)];
    }
#pragma unroll
    for (int n = 0; n < kRun; ++n)
      run[n] = n < count && owners[n] < t.experts ? table[owners[n]] : AdamWMove{0.0f, 0.0f};
    return;
  }
  const uint32_t part = t.size / t.experts;
  uint32_t expert = first / part;
  uint32_t next = (expert + 1) * part;
#pragma unroll
  for (int n = 0; n < kRun; ++n) {
    if (first + static_cast<uint32_t>(n) == next) {
      ++expert;
      next += part;
    }
    run[n] = n < count ? table[expert] : AdamWMove{0.0f, 0.0f};
  }
}

// Bytes per entry of a tensor with owners: 4 * 4 + 1 read and 3 * 4 written, 29 in all, in float32; 15 in 16 bits.
template <uint8_t kType>
__device__ void advance_run(const AdamWTensor& t, uint32_t first, const AdamWMove* table, float decay,
                            const AdamWOptions& options) {
  const int count = static_cast<int>(min(static_cast<uint32_t>(kRun), t.size - first));
  AdamWMove run[kRun];
  moves_of_run(t, first, count, table, run);
  bool any = false;
#pragma unroll
  for (int n = 0; n < kRun; ++n) any = any || run[n].root_scale != 0.0f;
  if (!any) return;
  if (t.vectors && count == kRun) {
    Run<kType> param, grad, exp_avg, exp_avg_sq;
    param.load(t.param, first);
    grad.load(t.grad, first);
    exp_avg.load(t.exp_avg, first);
    exp_avg_sq.load(t.exp_avg_sq, first);
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
      if (run[n].root_scale == 0.0f) continue;
      const AdamWEntry old = {param.get(n), exp_avg.get(n), exp_avg_sq.get(n)};
      const AdamWEntry entry = advance(old, grad.get(n), run[n], decay, options);
      param.set(n, entry.param);
      exp_avg.set(n, entry.exp_avg);
      exp_avg_sq.set(n, entry.exp_avg_sq);
    }
    param.store(t.param, first);
    exp_avg.store(t.exp_avg, first);
    exp_avg_sq.store(t.exp_avg_sq, first);
    return;
  }
#pragma unroll
  for (int n = 0; n < kRun; ++n) {
    if (run[n].root_scale == 0.0f) continue;
    const int64_t at = static_cast<int64_t>(first) + n;
    const AdamWEntry old = {load_float(t.param, kType, at), load_float(t.exp_avg, kType, at),
                            load_float(t.exp_avg_sq, kType, at)};
    const AdamWEntry entry = advance(old, load_float(t.grad, kType, at), run[n], decay, options);
    store_float(t.param, kType, at, entry.param);
    store_float(t.exp_avg, kType, at, entry.exp_avg);
    store_float(t.exp_avg_sq, kType, at, entry.exp_avg_sq);
  }
}

// The last tensor that begins at this block or before: tensors without entries have no blocks.
template <size_t kBytes>
__device__ int tensor_of_block(const AdamWTable<kBytes>& table, uint32_t block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.tensors[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Every block reads the counts of its tensor; the block that is the last to have done so counts up those of all
// tensors.
template <size_t kBytes>
__global__ void __launch_bounds__(kThreads) masked_adamw_kernel(const __grid_constant__ AdamWTable<kBytes> table) {
  __shared__ AdamWMove moves_of_experts[kMaxAdamWExperts];
  __shared__ bool last;
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_entries = blockIdx.x < table.blocks;
  const AdamWTensor& t = table.tensors[tensor_of_block(table, blockIdx.x)];
  const double lr = learning_rate(table.options);
  if (has_entries) {
    for (int e = thread; e < t.experts; e += kThreads) {
      moves_of_experts[e] = move_of(t, e, static_cast<float>(lr), table.options);
    }
  }
  __syncthreads();
  uint32_t ticket = 0;
  if (thread == 0) {
    __threadfence();
    ticket = atomicInc(table.options.ticket, gridDim.x - 1);  // back to zero after the last block's
  }
  const uint32_t first = (blockIdx.x - t.first_block) * kBlockEntries + static_cast<uint32_t>(thread * kRun);
  if (has_entries && first < t.size) {
    const float decay = static_cast<float>(1.0 - lr * table.options.weight_decay);
    if (t.dtype == kFloat32) {
      advance_run<kFloat32>(t, first, moves_of_experts, decay, table.options);
    } else if (t.dtype == kFloat16) {
      advance_run<kFloat16>(t, first, moves_of_experts, decay, table.options);
    } else {
      advance_run<kBFloat16>(t, first, moves_of_experts, decay, table.options);
    }
  }
  if (thread == 0) last = ticket == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int n = thread; n < table.count; n += kThreads) {
    const AdamWTensor& counted = table.tensors[n];
    for (int e = 0; e < counted.experts; ++e) {
      if (moves(counted, e)) counted.steps[e] += 1.0f;
    }
  }
}

bool takes_vectors(const AdamWTensor& t) {
  const auto aligned = [](const void* data, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  return aligned(t.param, kAlignment) && aligned(t.grad, kAlignment) && aligned(t.exp_avg, kAlignment) &&
         aligned(t.exp_avg_sq, kAlignment) && aligned(t.owner, sizeof(uint64_t));
}

template <size_t kBytes>
int launch(const AdamWParams& params, int32_t first, int32_t* taken, void* stream) {
  AdamWTable<kBytes> table = {};
  table.options = params.options;
  table.count = min(params.count - first, static_cast<int32_t>(AdamWTable<kBytes>::kCapacity));
  for (int32_t n = 0; n < table.count; ++n) {
    AdamWTensor& t = table.tensors[n];
    t = params.tensors[first + n];
    t.first_block = table.blocks;
    t.vectors = takes_vectors(t);
    table.blocks += t.size / kBlockEntries + (t.size % kBlockEntries != 0 ? 1 : 0);
    if (table.blocks > 0x7fffffffu) return kTooLarge;
  }
  *taken = table.count;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(max(table.blocks, 1u));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, masked_adamw_kernel<kBytes>, table);
}

}  // namespace

int masked_adamw_cuda(const AdamWParams& params, void* stream) {
  if (params.count < 0) return kNegativeSize;
  if (params.options.ticket == nullptr || (params.count > 0 && params.tensors == nullptr)) return kMissingPointer;
  for (int32_t n = 0; n < params.count; ++n) {
    const int status = check_adamw_tensor(params.tensors[n]);
    if (status != kOk) return status;
  }
  for (int32_t first = 0, taken = 0; first < params.count; first += taken) {
    int status = kOk;
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
    if (params.large_parameters && params.count - first > AdamWTable<kSmallTableBytes>::kCapacity) {
      status = launch<kLargeTableBytes>(params, first, &taken, stream);
    } else {
      status = launch<kSmallTableBytes>(params, first, &taken, stream);
    }
#else
    status = launch<kSmallTableBytes>(params, first, &taken, stream);
#endif
    if (status != kOk) return status;
  }
  return kOk;
}

}  // namespace mosa
