#include "merge.h"

#include <algorithm>
#include <numeric>

#include "float_rows.h"
#include "merge_math.h"
#include "parallel.h"
#include "status.h"
#include "vector_code.h"

namespace mosa {
namespace {

// Elements below which waking the other threads costs more than they save.
constexpr int64_t kElementsOfOneThread = 65536;
constexpr int kRowsPerItem = 16;
constexpr int kPiece = 512;  // elements whose working copies stay in the first cache
constexpr int kSums = 16;    // of a row, side by side

[[gnu::always_inline]] inline void merge_down_row(const MergeAdapter& a, int64_t row) {
  const bool has_initial = a.w_down_init != nullptr && a.down_factor != 1.0f;
  const auto k = static_cast<int>(row);
  float beta_sums[kSums] = {};
  for (int first = 0; first < a.width; first += kPiece) {
    const int count = std::min(kPiece, a.width - first);
    float down[kPiece], other[kPiece];
    load_floats(a.w_down, a.w_down_dtype, row * a.w_down_stride + first, count, down);
    if (has_initial) {
      load_floats(a.w_down_init, a.w_down_init_dtype, row * a.w_down_init_stride + first, count, other);
      for (int i = 0; i < count; ++i) down[i] = effective_down(down[i], other[i], a.down_factor);
    }
    if (a.beta != nullptr) {
      load_floats(a.beta, a.beta_dtype, first, count, other);
      int i = 0;
      for (; i + kSums <= count; i += kSums) {
        for (int lane = 0; lane < kSums; ++lane) beta_sums[lane] += down[i + lane] * other[i + lane];
      }
      for (; i < count; ++i) beta_sums[i % kSums] += down[i] * other[i];
    }
    if (a.gamma != nullptr) {
      load_floats(a.gamma, a.gamma_dtype, first, count, other);
      for (int i = 0; i < count; ++i) down[i] *= other[i];
    }
    store_floats(a.out_w_down, a.out_dtype, row * a.width + first, count, down);
  }
  merge_down_bias(a, k, std::accumulate(beta_sums, beta_sums + kSums, 0.0f));
}

// Rows [first, last) of the up-projection, at most kRowsPerItem, and their biases.
[[gnu::always_inline]] inline void merge_up_rows(const MergeAdapter& a, int64_t first, int64_t last) {
  const float scale = merge_scale(a), factor = scale * a.up_factor;
  float values[kPiece];
  const auto merge_run = [&](int64_t from, int64_t to, int64_t count) __attribute__((always_inline)) {
    for (int64_t done = 0; done < count; done += kPiece) {
      const auto part = static_cast<int>(std::min<int64_t>(kPiece, count - done));
      load_floats(a.w_up, a.w_up_dtype, from + done, part, values);
      for (int i = 0; i < part; ++i) values[i] *= factor;
      store_floats(a.out_w_up, a.out_dtype, to + done, part, values);
    }
  };
  if (a.w_up_stride == a.rank) {
    merge_run(first * a.rank, first * a.rank, (last - first) * a.rank);
  } else {
    for (int64_t row = first; row < last; ++row) merge_run(row * a.w_up_stride, row * a.rank, a.rank);
  }
  if (a.out_b_up == nullptr) return;
  const auto rows = static_cast<int>(last - first);
  float sums[kRowsPerItem] = {};
  for (int e = 0; e < a.experts; ++e) {
    load_floats(a.b_up, a.b_up_dtype, static_cast<int64_t>(e) * a.b_up_stride + first, rows, values);
    for (int i = 0; i < rows; ++i) sums[i] += values[i];
  }
  for (int i = 0; i < rows; ++i) sums[i] = merged_up_bias(sums[i], a.experts, scale);
  store_floats(a.out_b_up, a.out_dtype, first, rows, sums);
}

// Of the rows of both projections, first those of the down-projection.
[[gnu::always_inline]] inline void merge_rows(const MergeAdapter& a, int64_t first, int64_t last) {
  int64_t row = first;
  for (; row < std::min<int64_t>(last, a.rank); ++row) merge_down_row(a, row);
  if (row < last) merge_up_rows(a, row - a.rank, last - a.rank);
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
    run_in_vector_code<merge_rows>(a, first, last);
  });
  return kOk;
}

}  // namespace mosa
