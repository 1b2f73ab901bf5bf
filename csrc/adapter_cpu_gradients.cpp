#include "adapter_cpu_gradients.h"

#include <algorithm>
#include <numeric>

#include "float_rows.h"
#include "parallel.h"
#include "vector_code.h"

namespace mosa {
namespace {

constexpr int kColumns = 32;  // of the width that one work item of finish_gradients takes; 64 are as fast
constexpr int kUnits = 64;    // of the bottleneck that it takes at once
constexpr int kPiece = 1024;  // elements whose working copies stay in the first cache
constexpr int kSums = 16;     // of a row, side by side
constexpr size_t kRunsAtOnce = 8;

// All of the loops are compiled for several instruction sets (vector_code.h), so they are inlined by force.
[[gnu::always_inline]] inline void load_tensor(const CpuTensor& tensor, int64_t first, int count, float* to) {
  load_floats(tensor.data, tensor.dtype, first, count, to);
}

float element(const CpuTensor& tensor, int64_t index, float otherwise) {
  return tensor.data == nullptr ? otherwise : load_float(tensor.data, tensor.dtype, index);
}

// The sum of term(i) for i in [0, count), in kSums sums at once, which the compiler keeps in vectors.
template <typename Term>
[[gnu::always_inline]] inline float total(int count, const Term& term) {
  float sums[kSums] = {};
  int i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int lane = 0; lane < kSums; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < count; ++i) sums[i % kSums] += term(i);
  return std::accumulate(sums, sums + kSums, 0.0f);
}

// The factor on what an expert owns, and whether it owns an entry.
struct Ownership {
  const uint8_t* owner;
  uint8_t id;
  float factor;
  Ownership(const AdapterCpuParams& p, const uint8_t* assignment, int expert)
      : owner(expert == kMerged ? nullptr : assignment),
        id(static_cast<uint8_t>(expert)),
        factor(assignment == nullptr ? 1.0f
               : expert == kMerged   ? p.merged_scale
                                     : p.expert_scale) {}

  // to += factor * values where the expert owns the entries from `first` on. A mask and no branch: owners are random.
  [[gnu::always_inline]] void add(int64_t first, int count, const float* __restrict values,
                                  float* __restrict to) const {
    const float by = factor;
    if (owner == nullptr) {
      for (int i = 0; i < count; ++i) to[i] += by * values[i];
      return;
    }
    const uint8_t* __restrict of = owner + first;
    const uint8_t mine = id;
    for (int i = 0; i < count; ++i) to[i] += choose(of[i] == mine, by * values[i], 0.0f);
  }

  // values *= factor where the expert owns the entries from `first` on, else zero.
  [[gnu::always_inline]] void keep(int64_t first, int count, float* __restrict values) const {
    const float by = factor;
    if (by != 1.0f) {
      for (int i = 0; i < count; ++i) values[i] *= by;
    }
    if (owner == nullptr) return;
    const uint8_t* __restrict of = owner + first;
    const uint8_t mine = id;
    for (int i = 0; i < count; ++i) values[i] = choose(of[i] == mine, values[i], 0.0f);
  }

  // start + factor * (values - start) where the expert owns the entries from `first` on, else start.
  [[gnu::always_inline]] void blend(int64_t first, int count, const float* __restrict start,
                                    float* __restrict values) const {
    const float by = factor;
    if (by != 1.0f) {
      for (int i = 0; i < count; ++i) values[i] = start[i] + by * (values[i] - start[i]);
    }
    if (owner == nullptr) return;
    const uint8_t* __restrict of = owner + first;
    const uint8_t mine = id;
    for (int i = 0; i < count; ++i) values[i] = choose(of[i] == mine, values[i], start[i]);
  }
};

[[gnu::always_inline]] inline void fill_down(const AdapterCpuParams& p, int id, const CpuExpert& expert, float* rows) {
  const int width = p.width;
  const int64_t wide = padded(width), narrow = padded(p.rank);
  const Ownership own(p, p.assignment_down, id);
  std::vector<float> gamma(static_cast<size_t>(width)), beta(static_cast<size_t>(width));
  std::vector<float> initial(static_cast<size_t>(p.assignment_down != nullptr ? width : 0));
  if (p.gamma.data != nullptr) load_tensor(p.gamma, 0, width, gamma.data());
  if (p.beta.data != nullptr) load_tensor(p.beta, 0, width, beta.data());
  std::fill_n(expert.b_down, narrow, 0.0f);
  std::fill_n(expert.row_sums, narrow, 0.0f);
  for (int64_t k = 0; k < p.rank; ++k) {
    float* __restrict row = rows + k * wide;
    load_tensor(p.w_down, k * width, width, row);
    if (p.assignment_down != nullptr) {
      load_tensor(p.w_down_init, k * width, width, initial.data());
      own.blend(k * width, width, initial.data(), row);
    }
    expert.b_down[k] = element(p.b_down, k, 0.0f);
    const float* __restrict factors = beta.data();
    if (p.beta.data != nullptr) {
      expert.b_down[k] += total(width, [=](int i) __attribute__((always_inline)) { return row[i] * factors[i]; });
    }
    factors = gamma.data();
    if (p.gamma.data != nullptr) {
      for (int i = 0; i < width; ++i) row[i] *= factors[i];
    }
    std::fill(row + width, row + wide, 0.0f);
    expert.row_sums[k] = total(width, [=](int i) __attribute__((always_inline)) { return row[i]; });
  }
}

[[gnu::always_inline]] inline void fill_up(const AdapterCpuParams& p, int id, const CpuExpert& expert, float* rows) {
  const int width = p.width, rank = p.rank;
  const int64_t wide = padded(width), narrow = padded(rank);
  const Ownership own(p, p.assignment, id);
  const bool whole = rank == narrow;  // then rows follow each other without a gap
  const int step = whole ? std::max(kPiece / rank, 1) : 1;
  for (int j = 0; j < width; j += step) {
    const int count = std::min(step, width - j) * rank;
    float* row = rows + j * narrow;
    load_tensor(p.w_up, int64_t{j} * rank, count, row);
    own.keep(int64_t{j} * rank, count, row);
    if (!whole) std::fill(row + rank, row + narrow, 0.0f);
  }
  std::vector<float> values(static_cast<size_t>(width));
  std::fill_n(expert.b_up, wide, 0.0f);
  if (p.b_up.data == nullptr) return;
  const bool mean = p.experts > 0 && id == kMerged;
  const int64_t first = p.experts > 0 && !mean ? id : 0, count = mean ? p.experts : 1;
  for (int64_t e = first; e < first + count; ++e) {
    load_tensor(p.b_up, e * width, width, values.data());
    for (int j = 0; j < width; ++j) expert.b_up[j] += values[static_cast<size_t>(j)];
  }
  for (int j = 0; j < width; ++j) expert.b_up[j] /= static_cast<float>(count);
}

}  // namespace

void expert_down(const AdapterCpuParams& p, int id, const CpuExpert& expert, float* rows) {
  run_in_vector_code<fill_down>(p, id, expert, rows);
}

void expert_up(const AdapterCpuParams& p, int id, const CpuExpert& expert, float* rows) {
  run_in_vector_code<fill_up>(p, id, expert, rows);
}

bool wants_sums(const AdapterCpuGradients& g) {
  return g.w_down != nullptr || g.b_down != nullptr || g.w_up != nullptr || g.b_up != nullptr || g.gamma != nullptr ||
         g.beta != nullptr || g.scale != nullptr;
}

namespace {

// What runs of tiles summed up for one expert, or for all of them.
struct ExpertSums {
  int id;
  const CpuExpert* expert;
  std::vector<const CpuSums*> runs;
  std::vector<double> b_down;  // [rank] column sums of grad_z
};

struct Finish {
  const AdapterCpuParams& p;
  const AdapterCpuGradients& g;
  const CpuKernels& kernels;
  std::vector<ExpertSums> up;
  std::vector<ExpertSums> down;  // experts that share the down-projection are one
};

// Sums over the runs of `count` neighbours, kUnits * kColumns at most: some runs at a time, which rounds less often.
[[gnu::always_inline]] inline void sum_runs(const ExpertSums& sums, float* CpuSums::* part, int64_t first, int count,
                                            float* __restrict to) {
  float some[kUnits * kColumns];
  for (size_t begin = 0; begin < sums.runs.size(); begin += kRunsAtOnce) {
    const float* from = sums.runs[begin]->*part + first;
    const size_t end = std::min(begin + kRunsAtOnce, sums.runs.size());
    float* __restrict into = begin == 0 ? to : some;
    for (int i = 0; i < count; ++i) into[i] = from[i];
    for (size_t run = begin + 1; run < end; ++run) {
      from = sums.runs[run]->*part + first;
      for (int i = 0; i < count; ++i) into[i] += from[i];
    }
    for (int i = 0; begin > 0 && i < count; ++i) to[i] += some[i];
  }
}

// Of `units` units from `unit` on: a.T @ grad_out as rows of w_up, to [kColumns, kUnits]. Where the expert owns
// nothing: zeros, or the sums of whole products.
[[gnu::always_inline]] inline void sum_up(const Finish& f, const ExpertSums& sums, int64_t first, int count, int unit,
                                          int units, float* to) {
  const CpuOwned& owned = sums.expert->owned;
  if (owned.starts == nullptr) {
    const int64_t wide = padded(f.p.width);
    float up[kUnits * kColumns];
    for (int k = 0; k < units; ++k) sum_runs(sums, &CpuSums::up, (unit + k) * wide + first, count, up + k * kColumns);
    return f.kernels.transpose(up, kColumns, units, count, to, kUnits);
  }
  const int64_t begin = unit / kPad, end = std::min<int64_t>(begin + kUnits / kPad, owned.chunks);
  for (int column = 0; column < count; column += kPad) {
    const int64_t group = (first + column) / kPad;
    const int32_t* starts = owned.starts + group * owned.chunks;
    float slots[kUnits * kPad];
    sum_runs(sums, &CpuSums::up, int64_t{starts[begin]} * kPad, (starts[end] - starts[begin]) * kPad, slots);
    f.kernels.spread_owned({f.p.assignment, sums.id, f.p.width, f.p.rank}, owned, group, begin, end, slots,
                           to + column * kUnits, kUnits);
  }
}

// The expert's part of the gradients of w_up and scale.
[[gnu::always_inline]] inline double finish_up(const Finish& f, const ExpertSums& sums, int64_t first, int count) {
  const int rank = f.p.rank;
  const Ownership own(f.p, f.p.assignment, sums.id);
  const float alpha = static_cast<float>(f.p.scale / (1.0 - f.p.dropout_p));
  double scale = 0;
  for (int unit = 0; unit < rank; unit += kUnits) {
    const int units = std::min(kUnits, rank - unit);
    float up[kColumns * kUnits] = {};
    sum_up(f, sums, first, count, unit, units, up);
    for (int j = 0; f.g.scale != nullptr && j < count; ++j) {
      const float* row = sums.expert->up_rows + (first + j) * padded(rank) + unit;
      double parts[kSums] = {};
      for (int k = 0; k < units; ++k) parts[k % kSums] += static_cast<double>(row[k]) * up[j * kUnits + k];
      scale += std::accumulate(parts, parts + kSums, 0.0);
    }
    if (f.g.w_up == nullptr) continue;
    for (float& value : up) value *= alpha;
    for (int j = 0; j < count; ++j) {
      const int64_t index = (first + j) * rank + unit;
      if (units == kUnits) {
        own.add(index, kUnits, up + j * kUnits, f.g.w_up + index);
      } else {
        own.add(index, units, up + j * kUnits, f.g.w_up + index);
      }
    }
  }
  return scale / (1.0 - f.p.dropout_p);
}

// The expert's part of the gradients of b_up and scale.
[[gnu::always_inline]] inline double finish_bias(const Finish& f, const ExpertSums& sums, int64_t first, int count) {
  const AdapterCpuParams& p = f.p;
  double columns[kColumns] = {};
  for (const CpuSums* run : sums.runs) {
    for (int j = 0; j < count; ++j) columns[j] += double{run->columns[first + j]} - run->columns_excess[first + j];
  }
  const bool spread = p.experts > 0 && sums.id == kMerged;
  const int64_t begin = p.experts > 0 && !spread ? sums.id : 0, rows = spread ? p.experts : 1;
  const float factor = p.scale / static_cast<float>(rows);
  for (int64_t e = begin; f.g.b_up != nullptr && e < begin + rows; ++e) {
    float* row = f.g.b_up + e * p.width + first;
    for (int j = 0; j < count; ++j) row[j] += static_cast<float>(factor * columns[j]);
  }
  double scale = 0;
  for (int j = 0; j < count; ++j) scale += static_cast<double>(sums.expert->b_up[first + j]) * columns[j];
  return scale;
}

// With G = grad_z.T @ xhat: that of w_down is G * gamma + b_down's (x) beta, that of gamma the column sums of w_down
// * G, that of beta w_down.T @ b_down's.
[[gnu::always_inline]] inline void finish_down(const Finish& f, int64_t first, int count) {
  const AdapterCpuParams& p = f.p;
  const AdapterCpuGradients& g = f.g;
  float gamma[kColumns], beta[kColumns], grad_gamma[kColumns] = {}, grad_beta[kColumns] = {};
  std::fill_n(gamma, kColumns, 1.0f);
  std::fill_n(beta, kColumns, 0.0f);
  if (p.gamma.data != nullptr) load_tensor(p.gamma, first, count, gamma);
  if (p.beta.data != nullptr) load_tensor(p.beta, first, count, beta);
  for (int k = 0; k < p.rank; ++k) {
    const int64_t row = static_cast<int64_t>(k) * p.width + first;
    float trained[kColumns], initial[kColumns], grad[kColumns] = {};
    load_tensor(p.w_down, row, count, trained);
    if (p.assignment_down != nullptr) load_tensor(p.w_down_init, row, count, initial);
    for (const ExpertSums& sums : f.down) {
      const Ownership own(p, p.assignment_down, sums.id);
      const float bias = static_cast<float>(sums.b_down[static_cast<size_t>(k)]);
      float along[kColumns], weights[kColumns];
      sum_runs(sums, &CpuSums::down, k * padded(p.width) + first, count, along);
      for (int j = 0; j < count; ++j) weights[j] = along[j] * gamma[j] + bias * beta[j];
      own.add(row, count, weights, grad);
      // w_down as the expert sees it, without gamma, which may be zero.
      std::copy_n(trained, count, weights);
      if (p.assignment_down != nullptr) own.blend(row, count, initial, weights);
      for (int j = 0; j < count; ++j) grad_gamma[j] += weights[j] * along[j];
      for (int j = 0; j < count; ++j) grad_beta[j] += weights[j] * bias;
    }
    if (g.w_down != nullptr) std::copy_n(grad, count, g.w_down + row);
  }
  if (g.gamma != nullptr) std::copy_n(grad_gamma, count, g.gamma + first);
  if (g.beta != nullptr) std::copy_n(grad_beta, count, g.beta + first);
}

// Asks for the part of a matrix of sums that a work item reads: short stretches, far apart.
[[gnu::always_inline]] inline void ask(const std::vector<ExpertSums>& all, float* CpuSums::* part,
                                       const AdapterCpuParams& p, int64_t first, int count) {
  for (const ExpertSums& sums : all) {
    for (const CpuSums* run : sums.runs) {
      for (int k = 0; k < p.rank; ++k) {
        const float* from = run->*part + k * padded(p.width) + first;
        for (int j = 0; j < count; j += kPad) __builtin_prefetch(from + j);
      }
    }
  }
}

// The gradients of a work item's columns.
[[gnu::always_inline]] inline void finish_columns(const Finish& f, int64_t first, int count, double* scale) {
  const AdapterCpuGradients& g = f.g;
  if (f.up[0].expert->owned.starts == nullptr) ask(f.up, &CpuSums::up, f.p, first, count);
  ask(f.down, &CpuSums::down, f.p, first, count);
  if (g.w_up != nullptr) std::fill_n(g.w_up + first * f.p.rank, static_cast<int64_t>(count) * f.p.rank, 0.0f);
  for (int64_t e = 0; g.b_up != nullptr && e < std::max(f.p.experts, 1); ++e) {
    std::fill_n(g.b_up + e * f.p.width + first, count, 0.0f);
  }
  *scale = 0;
  for (const ExpertSums& sums : f.up) {
    if (g.w_up != nullptr || g.scale != nullptr) *scale += finish_up(f, sums, first, count);
    if (g.b_up != nullptr || g.scale != nullptr) *scale += finish_bias(f, sums, first, count);
  }
  if (g.w_down != nullptr || g.gamma != nullptr || g.beta != nullptr) finish_down(f, first, count);
}

[[gnu::always_inline]] inline void finish_item(const Finish& f, int64_t item, double* scale) {
  const int64_t first = item * kColumns;
  if (first + kColumns <= f.p.width) {  // short loops of a known length take half the time
    finish_columns(f, first, kColumns, scale);
  } else {
    finish_columns(f, first, static_cast<int>(f.p.width - first), scale);
  }
}

}  // namespace

void finish_gradients(const AdapterCpuParams& p, const AdapterCpuGradients& g, const CpuKernels& kernels,
                      const std::vector<int>& ids, const std::vector<CpuExpert>& experts,
                      const std::vector<int>& sums_expert, const std::vector<CpuSums>& sums, int threads) {
  Finish f = {p, g, kernels, {}, {}};
  const std::vector<double> zeros(static_cast<size_t>(p.rank), 0.0);
  for (size_t e = 0; e < experts.size(); ++e) f.up.push_back({ids[e], &experts[e], {}, zeros});
  for (size_t i = 0; i < sums.size(); ++i) {
    ExpertSums& to = f.up[static_cast<size_t>(sums_expert[i])];
    to.runs.push_back(&sums[i]);
    for (int k = 0; k < p.rank; ++k) {
      to.b_down[static_cast<size_t>(k)] += double{sums[i].b_down[k]} - sums[i].b_down_excess[k];
    }
  }
  ExpertSums all = {kMerged, nullptr, {}, zeros};
  for (const ExpertSums& part : f.up) {
    all.runs.insert(all.runs.end(), part.runs.begin(), part.runs.end());
    for (size_t k = 0; k < zeros.size(); ++k) all.b_down[k] += part.b_down[k];
  }
  for (size_t k = 0; g.b_down != nullptr && k < zeros.size(); ++k) g.b_down[k] = static_cast<float>(all.b_down[k]);
  f.down = p.assignment_down != nullptr ? f.up : std::vector<ExpertSums>{all};
  const int64_t items = (p.width + kColumns - 1) / kColumns;
  std::vector<double> scale(static_cast<size_t>(items));
  parallel_for(items, threads,
               [&](int64_t item) { run_in_vector_code<finish_item>(f, item, &scale[static_cast<size_t>(item)]); });
  if (g.scale != nullptr) *g.scale = static_cast<float>(std::accumulate(scale.begin(), scale.end(), 0.0));
}

}  // namespace mosa
