#include "merge.h"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

#include "merge_math.h"
#include "parallel.h"
#include "status.h"

namespace mosa {
namespace {

// Elements below which waking the other threads costs more than they save.
constexpr int64_t kElementsOfOneThread = 65536;
constexpr int kRowsPerItem = 16;
constexpr int kSums = 16;  // of a row, side by side

// Inlined by force, so that where the dtypes are constants the loops become vector code.
[[gnu::always_inline]] inline void merge_rows(const MergeAdapter a, int64_t first, int64_t last) {
  const float scale = merge_scale(a);
  for (int64_t row = first; row < last; ++row) {
    if (row >= a.rank) {
      const int i = static_cast<int>(row - a.rank);
      for (int k = 0; k < a.rank; ++k) merge_up(a, i, k, scale * a.up_factor);
      merge_up_bias(a, i, scale);
      continue;
    }
    const int k = static_cast<int>(row);
    float beta_sums[kSums] = {};
    int i = 0;
    for (; i + kSums <= a.width; i += kSums) {
      for (int lane = 0; lane < kSums; ++lane) beta_sums[lane] += merge_down(a, k, i + lane);
    }
    for (; i < a.width; ++i) beta_sums[i % kSums] += merge_down(a, k, i);
    merge_down_bias(a, k, std::accumulate(beta_sums, beta_sums + kSums, 0.0f));
  }
}

template <DType Type>
void merge_rows_of(MergeAdapter a, int64_t first, int64_t last) {
  a.w_down_dtype = a.w_down_init_dtype = a.b_down_dtype = a.gamma_dtype = a.beta_dtype = Type;
  a.w_up_dtype = a.b_up_dtype = a.scale_dtype = a.out_dtype = Type;
  merge_rows(a, first, last);
}

// Of what is there; the dtype of a null pointer says nothing.
bool are_all(const MergeAdapter& a, uint8_t wanted) {
  const std::pair<const void*, uint8_t> tensors[] = {{a.w_down, a.w_down_dtype}, {a.w_down_init, a.w_down_init_dtype},
                                                     {a.b_down, a.b_down_dtype}, {a.gamma, a.gamma_dtype},
                                                     {a.beta, a.beta_dtype},     {a.w_up, a.w_up_dtype},
                                                     {a.b_up, a.b_up_dtype},     {a.scale, a.scale_dtype},
                                                     {a.out_w_up, a.out_dtype}};
  return std::all_of(std::begin(tensors), std::end(tensors),
                     [=](const auto& tensor) { return tensor.first == nullptr || tensor.second == wanted; });
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
    if (are_all(a, kFloat32)) {
      merge_rows_of<kFloat32>(a, first, last);
    } else if (are_all(a, kBFloat16)) {
      merge_rows_of<kBFloat16>(a, first, last);
    } else {
      merge_rows(a, first, last);
    }
  });
  return kOk;
}

}  // namespace mosa
