// The merge of one element, shared by merge.cpp and merge.cu.
#pragma once

#include "merge.h"

namespace mosa {

MOSA_HOST_DEVICE inline float merge_scale(const MergeAdapter& a) {
  return a.scale != nullptr ? load_float(a.scale, a.scale_dtype, 0) : a.scale_value;
}

// Entry (k, i) of the down-projection that the merged adapter applies to normalised and affine tokens.
MOSA_HOST_DEVICE inline float effective_down(const MergeAdapter& a, int k, int i) {
  const float trained = load_float(a.w_down, a.w_down_dtype, static_cast<int64_t>(k) * a.w_down_stride + i);
  if (a.w_down_init == nullptr || a.down_factor == 1.0f) return trained;
  const float initial =
      load_float(a.w_down_init, a.w_down_init_dtype, static_cast<int64_t>(k) * a.w_down_init_stride + i);
  return initial + a.down_factor * (trained - initial);
}

// Writes entry (k, i) of out_w_down; returns its share of out_b_down[k].
MOSA_HOST_DEVICE inline float merge_down(const MergeAdapter& a, int k, int i) {
  const float down = effective_down(a, k, i);
  const float gamma = a.gamma != nullptr ? load_float(a.gamma, a.gamma_dtype, i) : 1.0f;
  store_float(a.out_w_down, a.out_dtype, static_cast<int64_t>(k) * a.width + i, down * gamma);
  return a.beta != nullptr ? down * load_float(a.beta, a.beta_dtype, i) : 0.0f;
}

MOSA_HOST_DEVICE inline void merge_down_bias(const MergeAdapter& a, int k, float beta_sum) {
  if (a.out_b_down == nullptr) return;
  const float bias = a.b_down != nullptr ? load_float(a.b_down, a.b_down_dtype, k) : 0.0f;
  store_float(a.out_b_down, a.out_dtype, k, bias + beta_sum);
}

MOSA_HOST_DEVICE inline void merge_up(const MergeAdapter& a, int i, int k, float factor) {
  const float up = load_float(a.w_up, a.w_up_dtype, static_cast<int64_t>(i) * a.w_up_stride + k);
  store_float(a.out_w_up, a.out_dtype, static_cast<int64_t>(i) * a.rank + k, factor * up);
}

MOSA_HOST_DEVICE inline void merge_up_bias(const MergeAdapter& a, int i, float scale) {
  if (a.out_b_up == nullptr) return;
  float sum = 0.0f;
  for (int e = 0; e < a.experts; ++e) {
    sum += load_float(a.b_up, a.b_up_dtype, static_cast<int64_t>(e) * a.b_up_stride + i);
  }
  store_float(a.out_b_up, a.out_dtype, i, scale * (sum / static_cast<float>(a.experts)));
}

}  // namespace mosa
