// What happens to single numbers between the two products: activation, its slope, dropout, the choice of an expert.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "adapter.h"
#include "counter_hash.h"

namespace mosa {

constexpr int kNoExpert = 1 << 30;  // larger than any id

// Entries of a vector that go through the activation at a time, in a loop that is not unrolled: all five activations,
// their slopes and the draws of dropout stand in the code for each.
constexpr int kTurn = 2;

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// The logistic form of (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2.
__device__ inline float tanh_gate(float z) { return sigmoid(z * (1.5957691216f + 0.0713548128f * z * z)); }

struct Activated {
  float value;
  float slope;
};

// The activation and its slope; what the caller does not look at is not computed.
__device__ inline Activated activate(float z, uint8_t activation) {
  switch (activation) {
    case kAdapterGelu: {
      const float share = 0.5f * (1.0f + erff(z * 0.7071067812f));
      return {z * share, share + z * 0.3989422804f * expf(-0.5f * z * z)};
    }
    case kAdapterGeluTanh: {
      const float gate = tanh_gate(z);
      return {z * gate, gate + z * gate * (1.0f - gate) * (1.5957691216f + 0.2140644385f * z * z)};
    }
    case kAdapterRelu:  // a NaN stays one
      return {z <= 0.0f ? 0.0f : z, z > 0.0f ? 1.0f : 0.0f};
    case kAdapterSilu: {
      const float gate = sigmoid(z);
      return {z * gate, gate * (1.0f + z * (1.0f - gate))};
    }
    default:
      return {z, 1.0f};
  }
}

__device__ inline int64_t group_value(const AdapterGroups& from, int token) {
  if (from.data == nullptr) return from.value;
  const int group = from.groups == 1 ? 0 : token / from.tokens;
  return from.is_int64 ? static_cast<const int64_t*>(from.data)[group] : static_cast<const int32_t*>(from.data)[group];
}

// The id of a token's expert; every negative one is the merged adapter. Owners are bytes, of which 255 names none, and
// are compared four at a time: what is beyond becomes 255.
__device__ inline int expert_of(const AdapterParams& p, int token) {
  const int64_t id = group_value(p.expert, token);
  return id < 0 ? kMergedExpert : static_cast<int>(id < kOwnerOfNothing ? id : kOwnerOfNothing);
}

// The draws of a token's bottleneck entries.
struct Dropout {
  DrawKey key;
  uint32_t first;  // counter of unit 0
  uint32_t threshold;
  float scale;

  __device__ Dropout(const AdapterParams& p, int token) : key(), first(0), threshold(p.drop_threshold), scale(1.0f) {
    if (threshold == 0) return;
    key = draw_key(group_value(p.seed, token));
    const int local = p.seed.groups == 1 ? token : token % p.seed.tokens;
    first = static_cast<uint32_t>(local) * static_cast<uint32_t>(p.rank);
    scale = p.keep_scale;
  }

  // What the entry is multiplied with: 0 where it is dropped.
  __device__ float factor(int unit) const {
    return threshold == 0 || draw(key, first + static_cast<uint32_t>(unit)) >= threshold ? scale : 0.0f;
  }
  template <typename Units>
  __device__ float factor(const Units& units, int slot) const {
    return threshold == 0 ? scale : factor(units.of(slot));
  }
};

// What the entries are multiplied with that an expert sees.
__device__ inline float factor_of(const AdapterParams& p, int e) { return e < 0 ? p.merged_scale : p.expert_scale; }

}  // namespace mosa
