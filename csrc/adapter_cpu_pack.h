// The weights of an expert as the tiles multiply by them: panels, or only the entries other than zero where those are
// few.
#pragma once

#include "adapter_cpu_sparse.h"

namespace mosa {
namespace {

constexpr size_t kPackedHeader = 64;  // its first byte says whether slots follow

#if defined(MOSA_BF16_PRODUCTS)
size_t packed_bytes(int64_t k, int64_t n) {
  return kPackedHeader + slots_bytes_beyond(k, n) + static_cast<size_t>(panel_elements(k, n)) * sizeof(Operand);
}
#else
size_t packed_bytes(int64_t k, int64_t n) {
  return kPackedHeader + static_cast<size_t>(panel_elements(k, n)) * sizeof(Operand);
}
inline bool pack_slots(const float*, int64_t, int64_t, int64_t, bool, void*) { return false; }
#endif

void pack(const float* rows, int64_t stride, int64_t k, int64_t n, bool transposed, bool sparse, void* packed) {
  char* body = static_cast<char*>(packed) + kPackedHeader;
  const bool slots = sparse && pack_slots(rows, stride, k, n, transposed, body);
  *static_cast<uint8_t*>(packed) = slots;
  if (slots) return;
  (transposed ? pack_panels_transposed : pack_panels)(rows, stride, k, n, reinterpret_cast<Operand*>(body));
}

// C[m, n] = A[m, k] B[k, n], B packed. Columns of C from n to padded(n) are written too.
void project(int64_t m, int64_t n, int64_t k, const Operand* a, int64_t a_stride, const void* packed, float* c,
             int64_t c_stride, const Ahead* ahead = nullptr) {
  const char* body = static_cast<const char*>(packed) + kPackedHeader;
#if defined(MOSA_BF16_PRODUCTS)
  if (*static_cast<const uint8_t*>(packed) != 0) return sparse_product(m, n, k, a, a_stride, body, c, c_stride);
#endif
  product(m, n, k, a, a_stride, reinterpret_cast<const Operand*>(body), k, c, c_stride, false, ahead);
}

}  // namespace
}  // namespace mosa
