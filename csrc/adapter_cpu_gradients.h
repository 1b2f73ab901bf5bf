// The adapter's parameters around the tiles: what an expert sees of them, and their gradients from the tiles' sums.
#pragma once

#include <vector>

#include "adapter_cpu.h"
#include "adapter_cpu_tile.h"

namespace mosa {

constexpr int kMerged = -1;

// Fills down_rows (times gamma) and b_down of an expert; -1 is the merged adapter.
void expert_down(const AdapterCpuParams& params, int id, const CpuExpert& expert);
// Fills up_rows and b_up.
void expert_up(const AdapterCpuParams& params, int id, const CpuExpert& expert);

// Whether any gradient needs sums over the tokens.
bool wants_sums(const AdapterCpuGradients& gradients);

// Adds up the sums of all runs, in order, and spreads each expert's over the entries that it owns.
void finish_gradients(const AdapterCpuParams& params, const AdapterCpuGradients& gradients, const std::vector<int>& ids,
                      const std::vector<CpuExpert>& experts, const std::vector<int>& sums_expert,
                      const std::vector<CpuSums>& sums, int threads);

}  // namespace mosa
