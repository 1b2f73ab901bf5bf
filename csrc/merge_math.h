// The arithmetic of the merge, shared by merge.cpp and merge.cu.
#pragma once

#include "merge.h"

namespace mosa {

MOSA_HOST_DEVICE inline float merge_scale(const MergeAdapter& a) {
  return a.scale != nullptr ? load_float(a.scale, a.scale_dtype, 0) : a.scale_value;
}

// An entry of the down-projection that the merged adapter applies to normalised and affine tokens.
MOSA_HOST_DEVICE inline float effective_down(float trained, float initial, float factor) {
  return initial + factor * (trained - initial);
}

MOSA_HOST_DEVICE inline void merge_down_bias(const MergeAdapter& a, int k, float beta_sum) {
  if (a.out_b_down == nullptr) return;
  const float bias = a.b_down != nullptr ? load_float(a.b_down, a.b_down_dtype, k) : 0.0f;
  store_float(a.out_b_down, a.out_dtype, k, bias + beta_sum);
}

MOSA_HOST_DEVICE inline float merged_up_bias(float sum, int experts, float scale) {
  return scale * (sum / static_cast<float>(experts));
}

}  // namespace mosa
