// The adapter on the CPU, forward and backward in one pass over tiles of tokens (arXiv 2312.02923, Eq. 1, 2 and 5).
//
//   u = LayerNorm(x)    z = u @ w_down_e.T + b_down    a = dropout(act(z))
//   out = [x] + [residual] + scale * (a @ w_up_e.T + b_up_e)
//
// The norm's weight and bias go into the down-projection while it is packed: w_down * gamma, b_down + w_down @ beta.
// Everything between x and out lives in a tile of 48 tokens in the L2 cache. Sums are in fp32; with bf16 products and a
// CPU that has them and is faster with them, the operands of the matrix products are bf16.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mosa {

// What the tiles are compiled for. Which of them this CPU and this build have: adapter_cpu_has.
enum InstructionSet : uint8_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kInstructionSetCount = 4 };
constexpr uint8_t kFastest = 255;  // whichever of them takes the least time
bool adapter_cpu_has(InstructionSet set);
InstructionSet adapter_cpu_fastest(bool bf16_products);

enum Activation : uint8_t { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3, kIdentity = 4, kActivationCount = 5 };

// A tensor of one of the dtypes of dtype.h, contiguous; null: not given.
struct CpuTensor {
  const void* data;
  uint8_t dtype;
};

struct AdapterCpuParams {
  CpuTensor x;         // [tokens, width]
  CpuTensor residual;  // like x, or null
  CpuTensor w_down;    // [rank, width]
  CpuTensor w_down_init;
  CpuTensor b_down;                // [rank]
  CpuTensor w_up;                  // [width, rank]
  CpuTensor b_up;                  // [experts, width], or [width] with experts == 0
  CpuTensor gamma;                 // [width]
  CpuTensor beta;                  // [width]
  const uint8_t* assignment;       // [width, rank]
  const uint8_t* assignment_down;  // [rank, width]
  const int64_t* expert;           // [expert_groups], -1: merged; null: expert_id for all tokens
  const int64_t* seed;             // [seed_groups]; null: seed_id
  int64_t expert_id;
  int64_t seed_id;

  int64_t tokens;
  int32_t width;
  int32_t rank;
  int32_t experts;
  int32_t expert_groups;
  int32_t seed_groups;

  float scale;
  float expert_scale;
  float merged_scale;
  float norm_eps;
  double dropout_p;
  uint8_t activation;
  bool add_input;
  bool bf16_products;       // allowed, where the CPU has them
  uint8_t instruction_set;  // the highest to use, or kFastest
  int32_t threads;
};

// Outputs of the forward pass. mean and rstd are null without a norm.
struct AdapterCpuOutputs {
  void* out;    // like x
  float* mean;  // [tokens]
  float* rstd;  // [tokens]
};

// Inputs and outputs of the backward pass. Gradients are fp32 but for that of x; null: not wanted.
struct AdapterCpuGradients {
  const void* grad_out;  // like x
  const float* mean;     // [tokens]
  const float* rstd;     // [tokens]
  void* x;               // like x
  float* w_down;         // [rank, width]
  float* b_down;         // [rank]
  float* w_up;           // [width, rank]
  float* b_up;           // [experts, width] or [width]
  float* gamma;          // [width]
  float* beta;           // [width]
  float* scale;          // []
};

// Both return a Status.
int adapter_cpu_forward(const AdapterCpuParams& params, const AdapterCpuOutputs& outputs);
int adapter_cpu_backward(const AdapterCpuParams& params, const AdapterCpuGradients& gradients);

}  // namespace mosa
