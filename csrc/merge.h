// Merge of many adapters into plain dense ones (arXiv 2312.02923, Eq. 7 and 8), with everything constant folded in.
//
//   eff_down = w_down_init + down_factor * (w_down - w_down_init)      (w_down itself without w_down_init)
//   out_w_down = eff_down * gamma      out_b_down = b_down + eff_down @ beta
//   out_w_up = scale * up_factor * w_up      out_b_up = scale * mean of b_up over the experts
//
// so that act(normalise(x) @ out_w_down.T + out_b_down) @ out_w_up.T + out_b_up is the merged adapter.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace mosa {

struct MergeAdapter {
  // Inputs; those that may be null are marked. Rows are contiguous and stand `*_stride` elements apart.
  const void* w_down;       // [r, d]
  const void* w_down_init;  // [r, d] or null
  const void* b_down;       // [r] or null
  const void* gamma;        // [d] or null: ones
  const void* beta;         // [d] or null: zeros
  const void* w_up;         // [d, r]
  const void* b_up;         // [experts, d] or null
  const void* scale;        // [] or null: scale_value; on the GPU it stays there, unread by the host
  // Outputs, contiguous, all of out_dtype.
  void* out_w_down;  // [r, d]
  void* out_b_down;  // [r] or null: not wanted
  void* out_w_up;    // [d, r]
  void* out_b_up;    // [d] or null: not wanted

  int32_t rank;     // r
  int32_t width;    // d
  int32_t experts;  // rows of b_up
  int32_t w_down_stride;
  int32_t w_down_init_stride;
  int32_t w_up_stride;
  int32_t b_up_stride;

  float scale_value;
  float up_factor;
  float down_factor;

  uint8_t w_down_dtype;
  uint8_t w_down_init_dtype;
  uint8_t b_down_dtype;
  uint8_t gamma_dtype;
  uint8_t beta_dtype;
  uint8_t w_up_dtype;
  uint8_t b_up_dtype;
  uint8_t scale_dtype;
  uint8_t out_dtype;
};

// The descriptors travel to the GPU as the parameters of the kernel: no copy to wait for, none to be lost in a CUDA
// graph. 4 KiB is what every architecture and driver takes.
constexpr size_t kKernelParameterBytes = 4096;
constexpr int kMaxMergeAdapters = (kKernelParameterBytes - sizeof(int64_t)) / sizeof(MergeAdapter);

struct MergeParams {
  int32_t count;
  MergeAdapter adapters[kMaxMergeAdapters];
};
static_assert(sizeof(MergeParams) <= kKernelParameterBytes, "MergeParams is a kernel parameter");

// Checks what the launchers rely on; returns a Status.
int check_merge(const MergeParams& params);

// Returns a Status. Runs on up to `threads` threads and returns when all is done.
int merge_cpu(const MergeParams& params, int threads);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device; returns a Status or a cudaError_t.
int merge_cuda(const MergeParams& params, void* stream);

}  // namespace mosa
