// What a step of AdamW does with an entry, and when it does: the same on CPU and GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "masked_adamw.h"
#include "portable.h"
#include "status.h"

namespace mosa {

// What a step does with the entries of one expert. An expert that stands still has a scale of 0.
struct AdamWMove {
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
};

struct AdamWEntry {
  float param;
  float exp_avg;
  float exp_avg_sq;
};

MOSA_HOST_DEVICE inline AdamWEntry advance(AdamWEntry old, float grad, AdamWMove move, float decay,
                                           const AdamWOptions& options) {
  const float exp_avg = old.exp_avg + (grad - old.exp_avg) * options.one_minus_beta1;
  const float exp_avg_sq = old.exp_avg_sq * options.beta2 + options.one_minus_beta2 * grad * grad;
  const float denominator = sqrtf(exp_avg_sq) * move.root_scale + options.eps;
  return {old.param * decay - exp_avg * move.step_size / denominator, exp_avg, exp_avg_sq};
}

MOSA_HOST_DEVICE inline bool moves(const AdamWTensor& t, int expert) {
  return t.active == nullptr || t.active[expert] != 0.0f;
}

// 1 - beta^t loses its digits where beta^t is near 1, hence expm1.
MOSA_HOST_DEVICE inline AdamWMove move_of(const AdamWTensor& t, int expert, float lr, const AdamWOptions& options) {
  if (!moves(t, expert)) return {0.0f, 0.0f};
  const float count = t.steps[expert] + 1.0f;
  return {lr / -expm1f(count * options.log_beta1), 1.0f / sqrtf(-expm1f(count * options.log_beta2))};
}

inline int check_adamw_tensor(const AdamWTensor& t) {
  if (t.experts > kMaxAdamWExperts) return kUnknownExpert;
  if (t.dtype >= kDTypeCount) return kUnknownDType;
  if (t.experts > 0 && t.steps == nullptr) return kMissingPointer;
  if (t.size > kMaxAdamWEntries) return kTooLarge;
  if (t.size == 0) return kOk;
  if (t.experts == 0 || (t.owner == nullptr && t.size % t.experts != 0)) return kUnknownExpert;
  const bool pointers = t.param != nullptr && t.grad != nullptr && t.exp_avg != nullptr && t.exp_avg_sq != nullptr;
  return pointers ? kOk : kMissingPointer;
}

}  // namespace mosa
