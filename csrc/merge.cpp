#include "merge.h"

#include <algorithm>

#include "merge_math.h"
#include "parallel.h"
#include "status.h"

namespace mosa {
namespace {

// Elements below which waking the other threads costs more than they save.
constexpr int64_t kElementsOfOneThread = 65536;
constexpr int kRowsPerItem = 16;

void merge_down_row(const MergeAdapter& a, int k) {
  float beta_sum = 0.0f;
  for (int i = 0; i < a.width; ++i) beta_sum += merge_down(a, k, i);
  merge_down_bias(a, k, beta_sum);
}

void merge_up_row(const MergeAdapter& a, int i) {
  const float scale = merge_scale(a);
  for (int k = 0; k < a.rank; ++k) merge_up(a, i, k, scale * a.up_factor);
  merge_up_bias(a, i, scale);
}

int64_t rows_of(const MergeAdapter& a) { return static_cast<int64_t>(a.rank) + a.width; }

}  // namespace

int check_merge(const MergeParams& params) {
  if (params.count < 0) return kNegativeSize;
  if (params.count > kMaxMergeAdapters) return kTooManyAdapters;
  for (int n = 0; n < params.count; ++n) {
    const MergeAdapter& a = params.adapters[n];
    if (a.rank < 1 || a.width < 1 || a.experts < 0) return kNegativeSize;
    const bool pointers = a.w_down != nullptr && a.w_up != nullptr && a.out_w_down != nullptr && a.out_w_up != nullptr;
    if (!pointers || (a.out_b_up != nullptr && (a.b_up == nullptr || a.experts == 0))) return kMissingPointer;
    for (uint8_t dtype : {a.w_down_dtype, a.w_down_init_dtype, a.b_down_dtype, a.gamma_dtype, a.beta_dtype,
                          a.w_up_dtype, a.b_up_dtype, a.scale_dtype, a.out_dtype}) {
      if (dtype >= kDTypeCount) return kUnknownDType;
    }
  }
  return kOk;
}

int merge_cpu(const MergeParams& params, int threads) {
  const int status = check_merge(params);
  if (status != kOk) return status;
  // An item is a run of rows of one adapter: first those of the down-projection, then those of the up-projection.
  int64_t starts[kMaxMergeAdapters + 1] = {0};
  int64_t elements = 0;
  for (int n = 0; n < params.count; ++n) {
    const MergeAdapter& a = params.adapters[n];
    starts[n + 1] = starts[n] + (rows_of(a) + kRowsPerItem - 1) / kRowsPerItem;
    elements += 2 * static_cast<int64_t>(a.rank) * a.width;
  }
  parallel_for(starts[params.count], elements < kElementsOfOneThread ? 1 : threads, [&](int64_t item) {
    const int n = static_cast<int>(std::upper_bound(starts, starts + params.count + 1, item) - starts) - 1;
    const MergeAdapter& a = params.adapters[n];
    const int64_t first = (item - starts[n]) * kRowsPerItem;
    const int64_t last = std::min(first + kRowsPerItem, rows_of(a));
    for (int64_t row = first; row < last; ++row) {
      if (row < a.rank) {
        merge_down_row(a, static_cast<int>(row));
      } else {
        merge_up_row(a, static_cast<int>(row - a.rank));
      }
    }
  });
  return kOk;
}

}  // namespace mosa
