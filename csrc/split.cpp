#include "split.h"

#include <algorithm>

#include "parallel.h"
#include "split_math.h"
#include "status.h"

namespace mosa {
namespace {

constexpr int64_t kEntriesPerItem = 2048;  // 0.2 ms, several times what starting a thread takes
constexpr int32_t kMaxExperts = 255;

}  // namespace

int check_split(const SplitParams& params) {
  const bool negative =
      params.line_per_row < 0 || params.line_per_column < 0 || params.unit_per_row < 0 || params.unit_per_column < 0;
  if (params.rows < 1 || params.columns < 1 || params.units < 1 || params.side < 1 || negative) return kNegativeSize;
  if (params.experts < 1 || params.experts > kMaxExperts) return kUnknownExpert;
  if (params.owner == nullptr) return kMissingPointer;
  const int64_t last = static_cast<int64_t>((params.rows - 1) / params.side) * params.unit_per_row +
                       static_cast<int64_t>((params.columns - 1) / params.side) * params.unit_per_column;
  return last < params.units ? kOk : kUnknownUnit;
}

int split_cpu(const SplitParams& params, int threads) {
  const int status = check_split(params);
  if (status != kOk) return status;
  const DrawKey key = draw_key(params.seed != nullptr ? *params.seed : params.seed_value);
  const int64_t entries = static_cast<int64_t>(params.rows) * params.columns;
  const int64_t items = (entries + kEntriesPerItem - 1) / kEntriesPerItem;
  parallel_for(items, threads, [&](int64_t item) {
    const int64_t last = std::min(entries, (item + 1) * kEntriesPerItem);
    uint32_t line = 0;
    LineShuffle shuffle = line_shuffle(params, key, line);
    for (int64_t entry = item * kEntriesPerItem; entry < last; ++entry) {
      const int64_t i = entry / params.columns, j = entry % params.columns;
      if (split_line(params, i, j) != line) {
        line = split_line(params, i, j);
        shuffle = line_shuffle(params, key, line);
      }
      params.owner[entry] = split_owner(params, shuffle, i, j);
    }
  });
  return kOk;
}

}  // namespace mosa
