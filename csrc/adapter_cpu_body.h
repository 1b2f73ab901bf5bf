// The adapter on one tile of tokens, for one instruction set.
#pragma once

#include "adapter_cpu_product.h"

namespace mosa {
namespace {

// Cuts a tile's scratch into parts of 64-byte alignment.
struct Scratch {
  uintptr_t next;
  template <typename Element>
  Element* take(int64_t elements) {
    Element* part = reinterpret_cast<Element*>(next);
    next += (static_cast<uintptr_t>(elements) * sizeof(Element) + 63) / 64 * 64;
    return part;
  }
};

struct ForwardScratch {
  float* row;  // [padded(width)]
  float* z;    // [rows, padded(rank)]
  float* y;    // [rows, padded(width)]
  Operand* u;  // [rows, padded(width)]
  Operand* a;  // [rows, padded(rank)]
  ForwardScratch(Scratch* from, int64_t width, int64_t rank)
      : row(from->take<float>(padded(width))),
        z(from->take<float>(kTileRows * padded(rank))),
        y(from->take<float>(kTileRows * padded(width))),
        u(from->take<Operand>(kTileRows * padded(width))),
        a(from->take<Operand>(kTileRows * padded(rank))) {}
};

struct BackwardScratch : ForwardScratch {
  float* other_row;    // [padded(width)]
  float* grad_a;       // [rows, padded(rank)]
  Operand* grad_out;   // [rows, padded(width)]
  Operand* grad_z;     // [rows, padded(rank)]
  Operand* a_columns;  // [padded(rank), rows]
  Operand* grad_z_columns;
  Operand* u_panels;  // of [rows, width]
  Operand* grad_out_panels;
  BackwardScratch(Scratch* from, int64_t width, int64_t rank)
      : ForwardScratch(from, width, rank),
        other_row(from->take<float>(padded(width))),
        grad_a(from->take<float>(kTileRows * padded(rank))),
        grad_out(from->take<Operand>(kTileRows * padded(width))),
        grad_z(from->take<Operand>(kTileRows * padded(rank))),
        a_columns(from->take<Operand>(kTileRows * padded(rank))),
        grad_z_columns(from->take<Operand>(kTileRows * padded(rank))),
        u_panels(from->take<Operand>(panel_elements(kTileRows, width))),
        grad_out_panels(from->take<Operand>(panel_elements(kTileRows, width))) {}
};

size_t scratch_bytes(int64_t width, int64_t rank, bool backward) {
  Scratch scratch = {0};
  if (backward) {
    BackwardScratch parts(&scratch, width, rank);
  } else {
    ForwardScratch parts(&scratch, width, rank);
  }
  return scratch.next;
}

// body(column, count) for whole vectors, then for what is left of the row.
template <typename Whole, typename Part>
inline void each_vector(int64_t width, const Whole& whole, const Part& part) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) whole(column);
  if (column < width) part(column, width - column);
}

template <typename Token>
inline void load_row(const Token* from, int64_t width, float* row) {
  each_vector(
      width, [&](int64_t column) { store(row + column, load(from + column)); },
      [&](int64_t column, int64_t count) { store(row + column, load_part(from + column, count)); });
  for (int64_t column = (width + kLanes - 1) / kLanes * kLanes; column < padded(width); column += kLanes) {
    store(row + column, Vector{});
  }
}

// Two passes over the row in the L1 cache: the second is about the mean of the first, so nothing cancels.
void statistics(const float* row, int64_t width, float eps, float* mean, float* rstd) {
  const float inverse = 1.0f / static_cast<float>(width);
  Vector total = {};
  for (int64_t column = 0; column < padded(width); column += kLanes) total += load(row + column);
  const float first = sum(total) * inverse;
  Vector deviations = {}, squares = {};
  float last_deviations = 0, last_squares = 0;
  each_vector(
      width,
      [&](int64_t column) {
        const Vector deviation = load(row + column) - first;
        deviations += deviation;
        squares += deviation * deviation;
      },
      [&](int64_t column, int64_t count) {
        for (int64_t i = column; i < column + count; ++i) {
          const float deviation = row[i] - first;
          last_deviations += deviation;
          last_squares += deviation * deviation;
        }
      });
  const float shift = (sum(deviations) + last_deviations) * inverse;
  const float variance = (sum(squares) + last_squares) * inverse - shift * shift;
  *mean = first + shift;
  *rstd = 1.0f / __builtin_sqrtf((variance > 0 ? variance : 0.0f) + eps);
}

// row = (row - mean) * rstd; the padding stays zero.
inline void normalize(float* row, int64_t width, float mean, float rstd) {
  each_vector(
      width, [&](int64_t column) { store(row + column, (load(row + column) - mean) * rstd); },
      [&](int64_t column, int64_t count) {
        for (int64_t i = column; i < column + count; ++i) row[i] = (row[i] - mean) * rstd;
      });
}

inline void set_row(Operand* to, const float* row, int64_t width) {
  for (int64_t column = 0; column < padded(width); column += kLanes) set_operand(to + column, load(row + column));
}

// One row of the panels of a [kTileRows, width] matrix.
inline void set_panel_row(Operand* panels, int row, const Operand* from, int64_t width) {
  for (int64_t column = 0; column < padded(width); column += kPanel) {
    const int64_t count = padded(width) - column < kPanel ? padded(width) - column : kPanel;
    Operand* to = panels + panel_index(kTileRows, row, column);
    for (int64_t i = 0; i < count; ++i) to[i * kPair] = from[column + i];
  }
}

inline Vector keep_factor(const CpuTileCall& call, int64_t token, int64_t unit) {
  const int64_t group = token / call.rows_per_seed;
  const int64_t first = (token - group * call.rows_per_seed) * call.rank + unit;
  return kept(static_cast<uint32_t>(first), call.seed[group], call.drop_below);
}

template <typename Token>
void forward_tile(const CpuTileCall& call, const int64_t* tokens, int n, const CpuExpert& expert, void* memory) {
  Scratch scratch = {reinterpret_cast<uintptr_t>(memory)};
  const ForwardScratch s(&scratch, call.width, call.rank);
  const int64_t width = call.width, wide = padded(width), narrow = padded(call.rank);
  const Token* x = static_cast<const Token*>(call.x);
  const Token* residual = static_cast<const Token*>(call.residual);

  for (int i = 0; i < n; ++i) {
    load_row(x + tokens[i] * width, width, s.row);
    if (call.rstd != nullptr) {
      float mean, rstd;
      statistics(s.row, width, call.norm_eps, &mean, &rstd);
      normalize(s.row, width, mean, rstd);
      call.mean[tokens[i]] = mean;
      call.rstd[tokens[i]] = rstd;
    }
    set_row(s.u + i * wide, s.row, width);
  }
  product(n, call.rank, width, s.u, wide, static_cast<const Operand*>(expert.down), width, s.z, narrow, false);
  for (int i = 0; i < n; ++i) {
    for (int64_t k = 0; k < narrow; k += kLanes) {
      Vector a = activate(call.activation, load(s.z + i * narrow + k) + load(expert.b_down + k), nullptr);
      if (call.dropout) a = select(keep_factor(call, tokens[i], k) != 0.0f, a, Vector{});
      set_operand(s.a + i * narrow + k, a);
    }
  }
  product(n, width, call.rank, s.a, narrow, static_cast<const Operand*>(expert.up), call.rank, s.y, wide, false);
  for (int i = 0; i < n; ++i) {
    const int64_t first = tokens[i] * width;
    const float* y = s.y + i * wide;
    Token* out = static_cast<Token*>(call.out) + first;
    each_vector(
        width,
        [&](int64_t column) {
          Vector v = load(y + column) * call.alpha + load(expert.b_up + column) * call.scale;
          if (call.add_input) v += load(x + first + column);
          if (residual != nullptr) v += load(residual + first + column);
          store(out + column, v);
        },
        [&](int64_t column, int64_t count) {
          Vector v = load(y + column) * call.alpha + load(expert.b_up + column) * call.scale;
          if (call.add_input) v += load_part(x + first + column, count);
          if (residual != nullptr) v += load_part(residual + first + column, count);
          store_part(out + column, v, count);
        });
  }
}

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g the gradient of xhat; overwrites grad.
inline void through_norm(float* grad, const float* normalized, int64_t width, float rstd) {
  Vector total = {}, along = {};
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    total += load(grad + column);  // the padding of both is zero
    along += load(grad + column) * load(normalized + column);
  }
  const float inverse = 1.0f / static_cast<float>(width);
  const float mean = sum(total) * inverse, slope = sum(along) * inverse;
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    store(grad + column, (load(grad + column) - mean - load(normalized + column) * slope) * rstd);
  }
}

template <typename Token>
void backward_tile(const CpuTileCall& call, const int64_t* tokens, int n, const CpuExpert& expert, const CpuSums& sums,
                   void* memory) {
  Scratch scratch = {reinterpret_cast<uintptr_t>(memory)};
  const BackwardScratch s(&scratch, call.width, call.rank);
  const int64_t width = call.width, wide = padded(width), narrow = padded(call.rank);
  const Token* x = static_cast<const Token*>(call.x);
  const Token* grad_out = static_cast<const Token*>(call.grad_out);

  if (sums.fresh) {
    for (int64_t i = 0; i < wide; i += kLanes) store(sums.columns + i, Vector{});
    for (int64_t i = 0; i < narrow; i += kLanes) store(sums.b_down + i, Vector{});
  }
  for (int i = 0; i < n; ++i) {
    load_row(x + tokens[i] * width, width, s.row);
    if (call.rstd != nullptr) normalize(s.row, width, call.mean[tokens[i]], call.rstd[tokens[i]]);
    set_row(s.u + i * wide, s.row, width);
    load_row(grad_out + tokens[i] * width, width, s.row);
    set_row(s.grad_out + i * wide, s.row, width);
    if (!call.weights) continue;
    for (int64_t c = 0; c < wide; c += kLanes) store(sums.columns + c, load(sums.columns + c) + load(s.row + c));
    set_panel_row(s.u_panels, i, s.u + i * wide, width);
    set_panel_row(s.grad_out_panels, i, s.grad_out + i * wide, width);
  }
  if (call.weights && n % 2 != 0) {  // the partner of the last token in a pair
    for (int64_t c = 0; c < wide; c += kLanes) set_operand(s.u + n * wide + c, Vector{});
    set_panel_row(s.u_panels, n, s.u + n * wide, width);
    set_panel_row(s.grad_out_panels, n, s.u + n * wide, width);
  }
  product(n, call.rank, width, s.u, wide, static_cast<const Operand*>(expert.down), width, s.z, narrow, false);
  product(n, call.rank, width, s.grad_out, wide, static_cast<const Operand*>(expert.up_back), width, s.grad_a, narrow,
          false);

  for (int i = 0; i < n; ++i) {
    for (int64_t k = 0; k < narrow; k += kLanes) {
      Vector slope;
      Vector a = activate(call.activation, load(s.z + i * narrow + k) + load(expert.b_down + k), &slope);
      Vector grad_z = load(s.grad_a + i * narrow + k) * call.alpha * slope;
      if (call.dropout) {
        const Mask keep = keep_factor(call, tokens[i], k) != 0.0f;
        a = select(keep, a, Vector{});
        grad_z = select(keep, grad_z, Vector{});
      }
      set_operand(s.a + i * narrow + k, a);
      set_operand(s.grad_z + i * narrow + k, grad_z);
      if (call.weights) store(sums.b_down + k, load(sums.b_down + k) + grad_z);
    }
  }
  if (call.weights) {
    for (int64_t k = 0; k < call.rank; ++k) {
      for (int i = 0; i < n; ++i) {
        s.a_columns[k * kTileRows + i] = s.a[i * narrow + k];
        s.grad_z_columns[k * kTileRows + i] = s.grad_z[i * narrow + k];
      }
      if (n % 2 != 0) s.a_columns[k * kTileRows + n] = s.grad_z_columns[k * kTileRows + n] = Operand(0);
    }
    product(call.rank, width, n, s.a_columns, kTileRows, s.grad_out_panels, kTileRows, sums.up, wide, !sums.fresh);
    product(call.rank, width, n, s.grad_z_columns, kTileRows, s.u_panels, kTileRows, sums.down, wide, !sums.fresh);
  }
  if (call.out == nullptr) return;

  product(n, width, call.rank, s.grad_z, narrow, static_cast<const Operand*>(expert.down_back), call.rank, s.y, wide,
          false);
  for (int i = 0; i < n; ++i) {
    const int64_t first = tokens[i] * width;
    float* grad = s.y + i * wide;
    if (call.rstd != nullptr) {
      load_row(x + first, width, s.row);
      normalize(s.row, width, call.mean[tokens[i]], call.rstd[tokens[i]]);
      through_norm(grad, s.row, width, call.rstd[tokens[i]]);
    }
    Token* out = static_cast<Token*>(call.out) + first;
    each_vector(
        width,
        [&](int64_t column) {
          const Vector v = load(grad + column);
          store(out + column, call.add_input ? v + load(grad_out + first + column) : v);
        },
        [&](int64_t column, int64_t count) {
          const Vector v = load(grad + column);
          store_part(out + column, call.add_input ? v + load_part(grad_out + first + column, count) : v, count);
        });
  }
}

void forward(const CpuTileCall& call, const int64_t* tokens, int n, const CpuExpert& expert, void* scratch) {
  if (call.half_tokens) return forward_tile<uint16_t>(call, tokens, n, expert, scratch);
  forward_tile<float>(call, tokens, n, expert, scratch);
}

void backward(const CpuTileCall& call, const int64_t* tokens, int n, const CpuExpert& expert, const CpuSums& sums,
              void* scratch) {
  if (call.half_tokens) return backward_tile<uint16_t>(call, tokens, n, expert, sums, scratch);
  backward_tile<float>(call, tokens, n, expert, sums, scratch);
}

constexpr CpuKernels kKernels = {panel_bytes, scratch_bytes, pack, pack_transposed, forward, backward};

}  // namespace
}  // namespace mosa
