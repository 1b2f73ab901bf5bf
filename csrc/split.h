// The split of a projection into experts (arXiv 2312.02923, section 3.2, Eq. 3): the owner of every entry.
//
// Entry (i, j) belongs to unit `(i / side) * unit_per_row + (j / side) * unit_per_column` of line
// `i * line_per_row + j * line_per_column`: a row, a column, or all in one. Every line is shared out by
// its own random permutation of its units: the unit that comes to place p belongs to expert p * experts / units.
#pragma once

#include <cstdint>

namespace mosa {

struct SplitParams {
  uint8_t* owner;       // [rows, columns], contiguous
  const int64_t* seed;  // [] or null: seed_value; on the GPU it stays there, unread by the host
  int64_t seed_value;
  int32_t rows;
  int32_t columns;
  int32_t experts;  // 1 to 255
  int32_t units;    // of a line
  int32_t side;     // of the square tiles that are one unit; 1: none
  int32_t line_per_row;
  int32_t line_per_column;
  int32_t unit_per_row;
  int32_t unit_per_column;
};

// Checks what the launchers rely on; returns a Status.
int check_split(const SplitParams& params);

// Returns a Status. Runs on up to `threads` threads and returns when all is done.
int split_cpu(const SplitParams& params, int threads);

// Enqueues one kernel on `stream` (a cudaStream_t) of the current device; returns a Status or a cudaError_t.
int split_cuda(const SplitParams& params, void* stream);

}  // namespace mosa
