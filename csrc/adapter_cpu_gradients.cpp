#include "adapter_cpu_gradients.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"

namespace mosa {
namespace {

constexpr int64_t kColumns = 32;  // of the width that one work item of finish_gradients takes

void load_floats(const CpuTensor& tensor, int64_t first, int64_t count, float* to) {
  if (tensor.dtype == kFloat32) {
    std::copy_n(static_cast<const float*>(tensor.data) + first, count, to);
  } else if (tensor.dtype == kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(tensor.data) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_to_float(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(tensor.data, tensor.dtype, first + i);
  }
}

float element(const CpuTensor& tensor, int64_t index, float otherwise) {
  return tensor.data == nullptr ? otherwise : load_float(tensor.data, tensor.dtype, index);
}

// In 16 sums at once, which the compiler keeps in vectors.
float dot(const float* a, const float* b, int64_t count) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int lane = 0; lane < 16; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) sums[i % 16] += a[i] * b[i];
  return std::accumulate(sums, sums + 16, 0.0f);
}

// The factor on what an expert owns, and whether it owns an entry.
struct Ownership {
  const uint8_t* owner;
  int id;
  float factor;
  Ownership(const AdapterCpuParams& p, const uint8_t* assignment, int expert)
      : owner(expert == kMerged ? nullptr : assignment),
        id(expert),
        factor(assignment == nullptr ? 1.0f
               : expert == kMerged   ? p.merged_scale
                                     : p.expert_scale) {}
  bool owns(int64_t index) const { return owner == nullptr || owner[index] == id; }

  // to += factor * values where the expert owns the entries from `first` on. A mask and no branch: owners are random.
  void add(int64_t first, int64_t count, const float* __restrict values, float* __restrict to) const {
    const float by = factor;
    if (owner == nullptr) {
      for (int64_t i = 0; i < count; ++i) to[i] += by * values[i];
      return;
    }
    const uint8_t* __restrict of = owner + first;
    const uint8_t mine = static_cast<uint8_t>(id);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t owned = 0u - static_cast<uint32_t>(of[i] == mine);
      to[i] += bits_to_float(float_to_bits(by * values[i]) & owned);
    }
  }
};

void multiply_add(const float* __restrict a, const float* __restrict b, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += a[i] * b[i];
}

void multiply_add(const float* __restrict a, float b, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += a[i] * b;
}

}  // namespace

void expert_down(const AdapterCpuParams& p, int id, const CpuExpert& expert) {
  const int64_t width = p.width, wide = padded(width), narrow = padded(p.rank);
  const Ownership own(p, p.assignment_down, id);
  std::vector<float> gamma(static_cast<size_t>(width), 1.0f), beta(static_cast<size_t>(width), 0.0f);
  const std::vector<float> ones(static_cast<size_t>(width), 1.0f);
  if (p.gamma.data != nullptr) load_floats(p.gamma, 0, width, gamma.data());
  if (p.beta.data != nullptr) load_floats(p.beta, 0, width, beta.data());
  std::vector<float> initial(static_cast<size_t>(width), 0.0f);
  std::fill_n(expert.b_down, narrow, 0.0f);
  std::fill_n(expert.row_sums, narrow, 0.0f);
  for (int64_t k = 0; k < p.rank; ++k) {
    float* row = expert.down_rows + k * wide;
    load_floats(p.w_down, k * width, width, row);
    if (p.assignment_down != nullptr) {
      load_floats(p.w_down_init, k * width, width, initial.data());
      for (int64_t j = 0; j < width; ++j) {
        const float start = initial[static_cast<size_t>(j)];
        const float trained = own.factor == 1.0f ? row[j] : start + own.factor * (row[j] - start);
        row[j] = own.owns(k * width + j) ? trained : start;
      }
    }
    expert.b_down[k] = element(p.b_down, k, 0.0f);
    if (p.beta.data != nullptr) expert.b_down[k] += dot(row, beta.data(), width);
    if (p.gamma.data != nullptr) {
      for (int64_t j = 0; j < width; ++j) row[j] *= gamma[static_cast<size_t>(j)];
    }
    std::fill(row + width, row + wide, 0.0f);
    expert.row_sums[k] = dot(row, ones.data(), width);
  }
}

void expert_up(const AdapterCpuParams& p, int id, const CpuExpert& expert) {
  const int64_t width = p.width, rank = p.rank, wide = padded(width), narrow = padded(rank);
  const Ownership own(p, p.assignment, id);
  std::vector<float> values(static_cast<size_t>(rank));
  for (int64_t j = 0; j < width; ++j) {
    float* row = expert.up_rows + j * narrow;
    std::fill_n(row, narrow, 0.0f);
    load_floats(p.w_up, j * rank, rank, values.data());
    own.add(j * rank, rank, values.data(), row);
  }
  std::fill_n(expert.b_up, wide, 0.0f);
  if (p.b_up.data == nullptr) return;
  std::vector<float> row(static_cast<size_t>(width));
  const bool mean = p.experts > 0 && id == kMerged;
  const int64_t first = p.experts > 0 && !mean ? id : 0, count = mean ? p.experts : 1;
  for (int64_t e = first; e < first + count; ++e) {
    load_floats(p.b_up, e * width, width, row.data());
    for (int64_t j = 0; j < width; ++j) expert.b_up[j] += row[static_cast<size_t>(j)];
  }
  for (int64_t j = 0; j < width; ++j) expert.b_up[j] /= static_cast<float>(count);
}

bool wants_sums(const AdapterCpuGradients& g) {
  return g.w_down != nullptr || g.b_down != nullptr || g.w_up != nullptr || g.b_up != nullptr || g.gamma != nullptr ||
         g.beta != nullptr || g.scale != nullptr;
}

namespace {

// The gradients of `count` columns of the width from column `first` on.
class ColumnGradients {
 public:
  ColumnGradients(const AdapterCpuParams& params, const AdapterCpuGradients& gradients, int64_t first, int64_t count)
      : p(params), g(gradients), first_(first), count_(count), up_(size()), down_(size()), columns_(kColumns) {
    for (int64_t k = 0; k < p.rank; ++k) {
      if (g.w_down != nullptr) std::fill_n(g.w_down + k * p.width + first, count, 0.0f);
    }
    if (g.w_up != nullptr) std::fill_n(g.w_up + first * p.rank, count * p.rank, 0.0f);
    for (int64_t e = 0; g.b_up != nullptr && e < std::max(p.experts, 1); ++e) {
      std::fill_n(g.b_up + e * p.width + first, count, 0.0f);
    }
    if (g.gamma != nullptr) std::fill_n(g.gamma + first, count, 0.0f);
    if (g.beta != nullptr) std::fill_n(g.beta + first, count, 0.0f);
  }

  // Adds one expert's part; returns its part of scale's gradient.
  double add(int id, const CpuExpert& expert, const std::vector<const CpuSums*>& sums,
             const std::vector<float>& b_down) {
    gather(sums, expert.owned);
    if (g.w_up != nullptr) add_up(id);
    if (g.b_up != nullptr) add_bias(id);
    if (g.w_down != nullptr || g.gamma != nullptr || g.beta != nullptr) add_down(id, b_down);
    return g.scale != nullptr ? scale_part(expert) : 0.0;
  }

 private:
  size_t size() const { return static_cast<size_t>(p.rank * kColumns); }

  void gather(const std::vector<const CpuSums*>& sums, const CpuOwned& owned) {
    const int64_t wide = padded(p.width);
    std::fill(columns_.begin(), columns_.end(), 0.0f);
    for (const CpuSums* s : sums) {
      for (int64_t j = 0; j < count_; ++j) columns_[static_cast<size_t>(j)] += s->columns[first_ + j];
    }
    for (int64_t k = 0; k < p.rank; ++k) {
      float* up = &up_[static_cast<size_t>(k * kColumns)];
      float* down = &down_[static_cast<size_t>(k * kColumns)];
      std::fill_n(up, kColumns, 0.0f);
      std::fill_n(down, kColumns, 0.0f);
      for (const CpuSums* s : sums) {
        const float* from_down = s->down + k * wide + first_;
        for (int64_t j = 0; j < count_; ++j) down[j] += from_down[j];
        if (owned.starts != nullptr) continue;
        const float* from_up = s->up + k * wide + first_;
        for (int64_t j = 0; j < count_; ++j) up[j] += from_up[j];
      }
    }
    if (owned.starts != nullptr) gather_owned(sums, owned);
  }

  void gather_owned(const std::vector<const CpuSums*>& sums, const CpuOwned& owned) {
    for (int64_t column = 0; column < count_; column += kPad) {
      const int32_t* starts = owned.starts + (first_ + column) / kPad * owned.chunks;
      for (int32_t slot = starts[0]; slot < starts[owned.chunks]; ++slot) {
        float values[kPad] = {};
        for (const CpuSums* s : sums) {
          for (int lane = 0; lane < kPad; ++lane) values[lane] += s->up[slot * kPad + lane];
        }
        for (int lane = 0; lane < kPad; ++lane) {
          const int32_t unit = owned.units[slot * kPad + lane];
          if (unit >= 0) up_[static_cast<size_t>(unit * kColumns + column + lane)] = values[lane];
        }
      }
    }
  }

  void add_up(int id) {
    const Ownership own(p, p.assignment, id);
    const float alpha = static_cast<float>(p.scale / (1.0 - p.dropout_p));
    std::vector<float> values(static_cast<size_t>(p.rank));
    for (int64_t j = 0; j < count_; ++j) {
      for (int64_t k = 0; k < p.rank; ++k) {
        values[static_cast<size_t>(k)] = alpha * up_[static_cast<size_t>(k * kColumns + j)];
      }
      const int64_t row = (first_ + j) * p.rank;
      own.add(row, p.rank, values.data(), g.w_up + row);
    }
  }

  void add_bias(int id) {
    const bool spread = p.experts > 0 && id == kMerged;
    const int64_t first = p.experts > 0 && !spread ? id : 0, rows = spread ? p.experts : 1;
    const float factor = p.scale / static_cast<float>(rows);
    for (int64_t e = first; e < first + rows; ++e) {
      float* row = g.b_up + e * p.width + first_;
      for (int64_t j = 0; j < count_; ++j) row[j] += factor * columns_[static_cast<size_t>(j)];
    }
  }

  // With G = grad_z.T @ xhat: that of w_down is G * gamma + b_down's (x) beta, that of gamma the column sums of w_down
  // * G, that of beta w_down.T @ b_down's.
  void add_down(int id, const std::vector<float>& b_down) {
    const Ownership own(p, p.assignment_down, id);
    for (int64_t j = 0; j < count_; ++j) {
      gamma_[j] = element(p.gamma, first_ + j, 1.0f);
      beta_[j] = element(p.beta, first_ + j, 0.0f);
    }
    const bool norm = g.gamma != nullptr || g.beta != nullptr;
    for (int64_t k = 0; k < p.rank; ++k) {
      const int64_t row = k * p.width + first_;
      const float* along = &down_[static_cast<size_t>(k * kColumns)];
      const float bias = b_down[static_cast<size_t>(k)];
      if (g.w_down != nullptr) {
        for (int64_t j = 0; j < count_; ++j) weights_[j] = along[j] * gamma_[j] + bias * beta_[j];
        own.add(row, count_, weights_, g.w_down + row);
      }
      if (!norm) continue;
      unscaled_row(own, k);
      if (g.gamma != nullptr) multiply_add(weights_, along, count_, g.gamma + first_);
      if (g.beta != nullptr) multiply_add(weights_, bias, count_, g.beta + first_);
    }
  }

  // w_down as the expert sees it, without gamma, which may be zero.
  void unscaled_row(const Ownership& own, int64_t k) {
    const int64_t row = k * p.width + first_;
    load_floats(p.w_down, row, count_, weights_);
    if (p.assignment_down == nullptr) return;
    for (int64_t j = 0; j < count_; ++j) {
      const float start = element(p.w_down_init, row + j, 0.0f);
      const float trained = own.factor == 1.0f ? weights_[j] : start + own.factor * (weights_[j] - start);
      weights_[j] = own.owns(row + j) ? trained : start;
    }
  }

  double scale_part(const CpuExpert& expert) const {
    double total = 0;
    for (int64_t j = 0; j < count_; ++j) {
      const float* row = expert.up_rows + (first_ + j) * padded(p.rank);
      double sum = 0;
      for (int64_t k = 0; k < p.rank; ++k) {
        sum += static_cast<double>(row[k]) * up_[static_cast<size_t>(k * kColumns + j)];
      }
      total +=
          sum / (1.0 - p.dropout_p) + static_cast<double>(expert.b_up[first_ + j]) * columns_[static_cast<size_t>(j)];
    }
    return total;
  }

  const AdapterCpuParams& p;
  const AdapterCpuGradients& g;
  const int64_t first_;
  const int64_t count_;
  std::vector<float> up_;       // [rank, kColumns] the expert's summed a.T @ grad_out
  std::vector<float> down_;     // [rank, kColumns] its grad_z.T @ xhat
  std::vector<float> columns_;  // [kColumns] its column sums of grad_out
  float gamma_[kColumns];
  float beta_[kColumns];
  float weights_[kColumns];
};

}  // namespace

void finish_gradients(const AdapterCpuParams& p, const AdapterCpuGradients& g, const std::vector<int>& ids,
                      const std::vector<CpuExpert>& experts, const std::vector<int>& sums_expert,
                      const std::vector<CpuSums>& sums, int threads) {
  std::vector<std::vector<const CpuSums*>> of_expert(experts.size());
  for (size_t i = 0; i < sums.size(); ++i) of_expert[static_cast<size_t>(sums_expert[i])].push_back(&sums[i]);
  std::vector<std::vector<float>> b_down(experts.size(), std::vector<float>(static_cast<size_t>(p.rank), 0.0f));
  if (g.b_down != nullptr) std::fill_n(g.b_down, p.rank, 0.0f);
  for (size_t e = 0; e < experts.size(); ++e) {
    for (const CpuSums* s : of_expert[e]) {
      for (int64_t k = 0; k < p.rank; ++k) b_down[e][static_cast<size_t>(k)] += s->b_down[k];
    }
    for (int64_t k = 0; k < p.rank && g.b_down != nullptr; ++k) g.b_down[k] += b_down[e][static_cast<size_t>(k)];
  }
  const int64_t items = (p.width + kColumns - 1) / kColumns;
  std::vector<double> scale(static_cast<size_t>(items), 0.0);
  parallel_for(items, threads, [&](int64_t item) {
    const int64_t first = item * kColumns;
    ColumnGradients columns(p, g, first, std::min(kColumns, p.width - first));
    for (size_t e = 0; e < experts.size(); ++e) {
      scale[static_cast<size_t>(item)] += columns.add(ids[e], experts[e], of_expert[e], b_down[e]);
    }
  });
  if (g.scale == nullptr) return;
  double total = 0;
  for (const double part : scale) total += part;
  *g.scale = static_cast<float>(total);
}

}  // namespace mosa
