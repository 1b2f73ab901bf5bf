// Plain calls, of which the compiler knows what AdapterParams holds for any.
//
// Training and inference mostly consist of them: LayerNorm, rows that begin at multiples of 16 bytes and have a width
// of whole steps, one type of weights. A kernel for any call asks after all this for every vector that it loads. Of the
// bf16 kernels for r = 64 on sm_90 (CUDA 13.0), the two loops of the forward pass have 392 and 738 instructions in
// place of 1644 and 1630; the backward pass over tokens takes 80 registers in place of 128, so that a multiprocessor
// runs three blocks in place of two, and spills 16 bytes in place of 388. No GPU has timed either.
#pragma once

#include <cstdint>

#include "adapter_memory.h"
#include "portable.h"

namespace mosa {

constexpr int kPlainWidth = 64;      // a multiple of every step's columns
constexpr int kMostPlainRank = 128;  // above, products take most of the time, and as much again to compile

// An AdapterTensor of known type and alignment.
template <typename T>
struct PlainTensor {
  const void* data;
  int64_t stride;
  static constexpr uint8_t dtype = Element<T>::kDType;
  static constexpr bool wide = true;

  explicit MOSA_HOST_DEVICE PlainTensor(const AdapterTensor& from) : data(from.data), stride(from.stride) {}
};

// One of known alignment: a residual, whose type under autocast is that of a block's output.
struct WideTensor {
  const void* data;
  int64_t stride;
  uint8_t dtype;
  static constexpr bool wide = true;

  explicit MOSA_HOST_DEVICE WideTensor(const AdapterTensor& from)
      : data(from.data), stride(from.stride), dtype(from.dtype) {}
};

// Members that hide those of AdapterParams are known or have known types; the others stay as they are.
template <typename X, typename W>
struct PlainParams : AdapterParams {
  PlainTensor<X> x;
  WideTensor residual;
  PlainTensor<W> w_down;
  PlainTensor<W> w_up;
  PlainTensor<W> gamma;
  PlainTensor<W> beta;
  static constexpr const uint8_t* assignment_down = nullptr;
  static constexpr bool wide_assignment = true;

  explicit PlainParams(const AdapterParams& p)
      : AdapterParams(p), x(p.x), residual(p.residual), w_down(p.w_down), w_up(p.w_up), gamma(p.gamma), beta(p.beta) {}
};

template <typename Params>
constexpr bool kIsPlain = true;
template <>
constexpr bool kIsPlain<AdapterParams> = false;

template <typename Params>
constexpr bool kHasNarrowTokens = false;
template <typename X, typename W>
constexpr bool kHasNarrowTokens<PlainParams<X, W>> = sizeof(X) == 2;

// Blocks that share a multiprocessor: three of the plain kernels of 16-bit tokens up to some rank, where the 80
// registers that a thread has then are enough for all but 24 bytes. Before sm_80 shared memory has room for two.
template <typename Params, int kRank, int kMostOfThree>
constexpr int kBlocks = kHasBFloat16Units && kHasNarrowTokens<Params> && kRank <= kMostOfThree ? 3 : 2;

// Steps of 16 of a product's depth that are unrolled: 28 instructions in place of 72 for four, where registers are
// left.
template <typename Params>
constexpr int kStepsAtOnce = kIsPlain<Params> ? 4 : 1;

// How many of a vector's elements are there, from column `at` of x or w_down, or from a unit on: eight or more.
template <typename Params>
__device__ inline int columns_from(const Params& p, int at) {
  return kIsPlain<Params> ? kVector : p.width - at;
}
template <typename Params>
__device__ inline int units_from(const Params& p, int unit) {
  if (kIsPlain<Params>) return unit < p.rank ? kVector : 0;
  return p.rank - unit;
}

template <typename Params>
__device__ inline bool has_norm(const Params& p) {
  return kIsPlain<Params> || p.gamma.data != nullptr;
}
template <typename Params>
__device__ inline bool has_beta(const Params& p) {
  return kIsPlain<Params> || p.beta.data != nullptr;
}

// The gradient of the output has the type of x.
__device__ inline const AdapterTensor& grad_out_of(const AdapterParams&, const AdapterBackward& b) {
  return b.grad_out;
}
template <typename X, typename W>
__device__ inline PlainTensor<X> grad_out_of(const PlainParams<X, W>&, const AdapterBackward& b) {
  return PlainTensor<X>(b.grad_out);
}

inline bool is_plain(const AdapterParams& p) {
  if (p.width % kPlainWidth != 0 || p.rank % kVector != 0) return false;
  if (p.assignment_down != nullptr || p.owned.tiles != nullptr) return false;
  if (p.assignment != nullptr && !p.wide_assignment) return false;
  if (p.residual.data != nullptr && !p.residual.wide) return false;
  for (const AdapterTensor* weight : {&p.w_down, &p.w_up, &p.gamma, &p.beta}) {
    if (weight->data == nullptr || !weight->wide || weight->dtype != p.w_down.dtype) return false;
  }
  return p.x.wide;
}

// Calls launch(params) with what is known of the call: PlainParams in types that are used together, for products of E.
// `wide`: so are the tensors beside the parameters.
template <typename E, int kRank, bool kListed, typename Launch>
int for_known(const AdapterParams& p, bool wide, const Launch& launch) {
  constexpr uint8_t kProducts = Element<E>::kDType;
  if constexpr (!kListed && kRank <= kMostPlainRank) {
    const bool plain = wide && is_plain(p);
    const auto typed = [&](uint8_t x, uint8_t weights) { return plain && p.x.dtype == x && p.w_down.dtype == weights; };
    if (typed(kProducts, kProducts)) return launch(PlainParams<E, E>(p));
    if constexpr (kProducts != kFloat32) {
      if (typed(kProducts, kFloat32)) return launch(PlainParams<E, float>(p));
      if (typed(kFloat32, kFloat32)) return launch(PlainParams<float, float>(p));
    }
  }
  return launch(p);
}

}  // namespace mosa
