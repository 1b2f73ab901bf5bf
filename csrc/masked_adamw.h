// AdamW that moves only the entries of active experts (arXiv 2312.02923, Eq. 4), for all adapters of a model at once.
//
//   t += 1                                        of each active expert: every expert counts its own steps
//   m = m + (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Entries of other experts keep parameter and moments bit by bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace mosa {

struct AdamWTensor {
  void* param;           // [size], contiguous, of `dtype`, as are:
  const void* grad;      // [size]
  void* exp_avg;         // [size]
  void* exp_avg_sq;      // [size]
  const uint8_t* owner;  // [size], the expert of each entry; null: expert e owns the e-th of `experts` equal parts
  float* steps;          // [experts], counted up
  const float* active;   // [experts], nonzero where the expert moves; null: all do
  uint32_t size;
  uint32_t first_block;  // of the launch; the launcher fills it in
  uint16_t experts;      // 1 for an ordinary parameter
  uint8_t dtype;
  bool vectors;  // whether the addresses allow 16-byte accesses; the launcher fills it in
};

struct AdamWOptions {
  const void* lr;    // [] or null: lr_value; on the GPU it stays there, unread by the host
  uint32_t* ticket;  // [] zero before and after every launch; launches that share it must not overlap. None on a CPU
  double lr_value;
  double weight_decay;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float log_beta1;  // -inf for 0
  float log_beta2;
  float eps;
  bool lr_is_double;  // float64, not float32
};

struct AdamWParams {
  AdamWOptions options;
  const AdamWTensor* tensors;  // [count], read before the launcher returns
  int32_t count;
  bool large_parameters;  // whether the driver takes 32 KiB of kernel parameters (CUDA 12.1) or 4
};

constexpr int32_t kMaxAdamWExperts = 256;
constexpr uint32_t kMaxAdamWEntries = 0x7fffffff;  // of a tensor

// The table of tensors travels as a parameter of the kernel: nothing is copied that a CUDA graph could lose.
constexpr size_t kSmallTableBytes = 4096;
constexpr size_t kLargeTableBytes = 32764;

template <size_t kBytes>
struct AdamWTable {
  static constexpr int kCapacity = (kBytes - sizeof(AdamWOptions) - sizeof(uint64_t)) / sizeof(AdamWTensor);
  AdamWOptions options;
  int32_t count;
  uint32_t blocks;
  AdamWTensor tensors[kCapacity];
};
static_assert(sizeof(AdamWTable<kSmallTableBytes>) <= kSmallTableBytes, "a kernel parameter");
static_assert(sizeof(AdamWTable<kLargeTableBytes>) <= kLargeTableBytes, "a kernel parameter");

// One step, in place, on up to so many threads, which do not change the result; lr is `lr_value`. Returns a Status.
int masked_adamw_cpu(const AdamWParams& params, int threads);

// One step, in place: one launch per 454 tensors (55 with small parameters) on `stream` (a cudaStream_t) of the current
// device. Returns a Status or a cudaError_t.
int masked_adamw_cuda(const AdamWParams& params, void* stream);

}  // namespace mosa
