#include "split.h"

#include <algorithm>

#include "parallel.h"
#include "split_math.h"
#include "status.h"

namespace mosa {
namespace {

constexpr int32_t kMaxExperts = 255;
// Entries that go through a round together, so that the rounds of one need not wait for those of the next: 49152
// entries take 3 ms on one core in place of 9.
constexpr int64_t kTogether = 32;
constexpr int64_t kEntriesPerItem = 64 * kTogether;

// A line with the entries in it: a row, a column or all.
struct Line {
  const SplitParams& params;
  int64_t number;

  int64_t row(int64_t entry) const {
    return params.line_per_row != 0 ? number : params.line_per_column != 0 ? entry : entry / params.columns;
  }
  int64_t column(int64_t entry) const {
    return params.line_per_column != 0 ? number : params.line_per_row != 0 ? entry : entry % params.columns;
  }
};

void draw_owners(const Line& line, DrawKey key, int64_t first, int64_t last) {
  const SplitParams& params = line.params;
  const LineShuffle shuffle = line_shuffle(params, key, static_cast<uint32_t>(line.number));
  for (int64_t start = first; start < last; start += kTogether) {
    const int64_t count = std::min(kTogether, last - start);
    uint32_t places[kTogether] = {0};
    for (int64_t n = 0; n < count; ++n) places[n] = split_unit(params, line.row(start + n), line.column(start + n));
    for (uint32_t round = 0; round < kSplitRounds; ++round) {
      for (uint32_t& place : places) place = shuffle_round(shuffle, round, place);
    }
    for (int64_t n = 0; n < count; ++n) {
      params.owner[line.row(start + n) * params.columns + line.column(start + n)] = owner_at(params, places[n]);
    }
  }
}

}  // namespace

int check_split(const SplitParams& params) {
  const bool negative = params.unit_per_row < 0 || params.unit_per_column < 0;
  if (params.rows < 1 || params.columns < 1 || params.units < 1 || params.side < 1 || negative) return kNegativeSize;
  if (params.experts < 1 || params.experts > kMaxExperts) return kUnknownExpert;
  if (params.owner == nullptr) return kMissingPointer;
  const bool by_row = params.line_per_row == 1 && params.line_per_column == 0;
  const bool by_column = params.line_per_row == 0 && params.line_per_column == 1;
  if (!by_row && !by_column && (params.line_per_row != 0 || params.line_per_column != 0)) return kUnknownLine;
  const int64_t last = static_cast<int64_t>((params.rows - 1) / params.side) * params.unit_per_row +
                       static_cast<int64_t>((params.columns - 1) / params.side) * params.unit_per_column;
  return last < params.units ? kOk : kUnknownUnit;
}

int split_cpu(const SplitParams& params, int threads) {
  const int status = check_split(params);
  if (status != kOk) return status;
  const DrawKey key = draw_key(params.seed != nullptr ? *params.seed : params.seed_value);
  const int64_t entries = static_cast<int64_t>(params.rows) * params.columns;
  const int64_t lines = params.line_per_row != 0 ? params.rows : params.line_per_column != 0 ? params.columns : 1;
  const int64_t line_entries = entries / lines;
  const int64_t line_items = (line_entries + kEntriesPerItem - 1) / kEntriesPerItem;
  parallel_for(lines * line_items, threads, [&](int64_t item) {
    const int64_t first = item % line_items * kEntriesPerItem;
    draw_owners({params, item / line_items}, key, first, std::min(first + kEntriesPerItem, line_entries));
  });
  return kOk;
}

}  // namespace mosa
