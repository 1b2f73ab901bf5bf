// The adapter's parameters around the tiles: what an expert sees of them, and their gradients from the tiles' sums.
#pragma once

#include <vector>

#include "adapter_cpu.h"
#include "adapter_cpu_tile.h"

namespace mosa {

constexpr int kMerged = -1;

// Fills b_down and row_sums of an expert, and rows [rank, padded(width)] with w_down_e * gamma; -1 is the merged
// adapter.
void expert_down(const AdapterCpuParams& params, int id, const CpuExpert& expert, float* rows);
// Fills b_up, and rows [width, padded(rank)] with w_up_e.
void expert_up(const AdapterCpuParams& params, int id, const CpuExpert& expert, float* rows);

// Whether any gradient needs sums over the tokens.
bool wants_sums(const AdapterCpuGradients& gradients);

// Adds up the sums of all runs, in order, and spreads each expert's over the entries that it owns.
void finish_gradients(const AdapterCpuParams& params, const AdapterCpuGradients& gradients, const CpuKernels& kernels,
                      const std::vector<int>& ids, const std::vector<CpuExpert>& experts,
                      const std::vector<int>& sums_expert, const std::vector<CpuSums>& sums, int threads);

}  // namespace mosa
