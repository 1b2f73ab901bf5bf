// Vectors of fp32 for one instruction set (GCC's and Clang's vector extension), and the bottleneck's activations.
// Included once by each adapter_cpu_*.cpp; everything is local to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(MOSA_BF16_PRODUCTS)
#include <immintrin.h>
#endif

namespace mosa {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kPanelVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vector splat(float value) { return value - Vector{}; }
inline Vector load(const float* from) {
  Vector v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(float* to, Vector v) { __builtin_memcpy(to, &v, sizeof(v)); }
inline Vector select(Mask mask, Vector yes, Vector no) {
  return bit_cast<Vector>((mask & bit_cast<Mask>(yes)) | (~mask & bit_cast<Mask>(no)));
}
inline float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// Lanes of a and b in turn: those of their lower halves (Half 0) or of their upper ones (1).
template <int Half, size_t... Lane>
inline Bits interleave(Bits a, Bits b, std::index_sequence<Lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (Half * kLanes / 2 + Lane / 2 + Lane % 2 * kLanes)...);
#else
  return Bits{(Lane % 2 == 0 ? a : b)[Half * kLanes / 2 + Lane / 2]...};
#endif
}

// Rows become columns in registers: each pass doubles the stretches of a column that stand together. 49 152 entries of
// fp32 took 45 us one by one.
inline void transpose(Bits (&rows)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int pass = 1; pass < kLanes; pass *= 2) {
    Bits next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// To nearest, ties to even; NaN stays NaN.
inline Halves to_bfloat16(Vector v) {
#if defined(MOSA_BF16_PRODUCTS)
  return bit_cast<Halves>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
#else
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40u;
  const Mask nan = (v != v);
  const Bits chosen = (bit_cast<Bits>(nan) & quiet) | (~bit_cast<Bits>(nan) & rounded);
  return __builtin_convertvector(chosen, Halves);
#endif
}
inline Vector from_bfloat16(Halves h) { return bit_cast<Vector>(__builtin_convertvector(h, Bits) << 16); }

inline Vector load(const uint16_t* from) {
  Halves h;
  __builtin_memcpy(&h, from, sizeof(h));
  return from_bfloat16(h);
}
inline void store(uint16_t* to, Vector v) {
  const Halves h = to_bfloat16(v);
  __builtin_memcpy(to, &h, sizeof(h));
}
// The first `count` lanes alone; the others read as zero.
template <typename Element>
inline Vector load_part(const Element* from, int64_t count) {
  Element buffer[kLanes] = {};
  __builtin_memcpy(buffer, from, static_cast<size_t>(count) * sizeof(Element));
  return load(buffer);
}
template <typename Element>
inline void store_part(Element* to, Vector v, int64_t count) {
  Element buffer[kLanes];
  store(buffer, v);
  __builtin_memcpy(to, buffer, static_cast<size_t>(count) * sizeof(Element));
}

// exp(x) to about one unit in the last place; below -87 it goes to zero, above 88 to infinity.
inline Vector exponential(Vector x) {
  const Vector low = splat(-104.0f), high = splat(89.0f);
  x = select(x < low, low, x);
  x = select(x > high, high, x);
  const Vector shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector biased = x * 1.44269504f + shift;
  const Vector k = biased - shift;
  const Vector r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  Vector p = splat(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^k in two factors, so that results below the smallest normal number and overflow come out right.
  const Mask exponent = bit_cast<Mask>(biased) - 0x4b400000;
  const Mask half = exponent >> 1;
  const Mask rest = exponent - half;
  return p * bit_cast<Vector>((half + 127) << 23) * bit_cast<Vector>((rest + 127) << 23);
}

constexpr float kTail[] = {0.0997355655f, 0.0997366980f,  0.0934597477f, 0.0816737190f,  0.0585837327f,
                           0.0649315417f, -0.0340008847f, 0.0980569795f, -0.0823006555f, 0.0201235674f};

// The normal distribution function and density. The tail is exp(-z^2/2) t P(t), t = 1/(1 + |z|/4); P was fitted to a
// relative error of 5e-8, so even far tails keep their digits.
inline void normal_distribution(Vector z, Vector* distribution, Vector* density) {
  const Vector magnitude = select(z < 0.0f, -z, z);
  const Vector e = exponential(z * z * -0.5f);
  const Vector t = 1.0f / (1.0f + magnitude * 0.25f);
  Vector p = splat(kTail[9]);
  for (int i = 8; i >= 0; --i) p = p * t + kTail[i];
  const Vector tail = e * t * p;
  *distribution = select(z < 0.0f, tail, 1.0f - tail);
  *density = e * 0.398942280f;
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

enum : uint8_t { kGeluCode = 0, kGeluTanhCode = 1, kReluCode = 2, kSiluCode = 3 };

// The activation and, where `slope` is not null, its derivative.
inline Vector activate(uint8_t activation, Vector z, Vector* slope) {
  if (activation == kGeluCode) {
    Vector distribution, density;
    normal_distribution(z, &distribution, &density);
    if (slope) *slope = distribution + z * density;
    return z * distribution;
  }
  if (activation == kGeluTanhCode) {  // z (1 + tanh(v)) / 2 = z sigmoid(2 v)
    const Vector twice = z * (1.59576912f + z * z * 0.0713548162f);
    const Vector s = sigmoid(twice);
    if (slope) *slope = s + z * s * (1.0f - s) * (1.59576912f + z * z * 0.214064449f);
    return z * s;
  }
  if (activation == kReluCode) {
    if (slope) *slope = select(z <= 0.0f, splat(0.0f), splat(1.0f));
    return select(z < 0.0f, splat(0.0f), z);  // NaN stays NaN
  }
  if (activation == kSiluCode) {
    const Vector s = sigmoid(z);
    if (slope) *slope = s * (1.0f + z * (1.0f - s));
    return z * s;
  }
  if (slope) *slope = splat(1.0f);
  return z;
}

// The counter-based dropout of mosa_kernels/backends/dropout.py.
inline Bits hash32(Bits h) {
  h = (h ^ (h >> 16)) * 0x21f0aaadu;
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  return h ^ (h >> 15);
}

// 1 for kept entries first, first + 1, ... of a seed's stream, else 0.
inline Vector kept(uint32_t first, int64_t seed, uint32_t drop_below) {
  Bits index;
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(i);
  index += first + static_cast<uint32_t>(seed);
  const Bits bits = hash32(hash32(index) ^ static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  const Mask keep = (bits >= drop_below);
  return bit_cast<Vector>(keep & bit_cast<Mask>(splat(1.0f)));
}

}  // namespace
}  // namespace mosa
