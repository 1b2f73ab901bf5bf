// The adapter on one tile of tokens, for one instruction set.
#pragma once

#include "adapter_cpu_pack.h"

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
  float* columns;      // [padded(width)] sums of grad_out over a few rows
  float* b_down;       // [padded(rank)] of grad_z
  float* grad_a;       // [rows, padded(rank)]
  Operand* grad_out;   // [rows, padded(width)]
  Operand* grad_z;     // [rows, padded(rank)]
  Operand* a_columns;  // [padded(rank), rows]
  Operand* grad_z_columns;
  Operand* u_panels;  // of [rows, width]
  Operand* grad_out_panels;
  BackwardScratch(Scratch* from, int64_t width, int64_t rank)
      : ForwardScratch(from, width, rank),
        columns(from->take<float>(padded(width))),
        b_down(from->take<float>(padded(rank))),
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

// The sum of term(column) over a padded row. Four sums at once: one would wait for each addition.
template <typename Term>
inline Vector total(int64_t wide, const Term& term) {
  Vector sums[4] = {};
  int64_t column = 0;
  for (; column + 4 * kLanes <= wide; column += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) sums[i] += term(column + i * kLanes);
  }
  for (; column < wide; column += kLanes) sums[0] += term(column);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// A row of tokens as fp32, with zeros up to padded(width).
template <typename Token>
inline void load_row(const Token* from, int64_t width, float* row) {
  each_vector(
      width, [&](int64_t column) { store(row + column, load(from + column)); },
      [&](int64_t column, int64_t count) { store(row + column, load_part(from + column, count)); });
  for (int64_t column = (width + kLanes - 1) / kLanes * kLanes; column < padded(width); column += kLanes) {
    store(row + column, Vector{});
  }
}

// Mean and reciprocal standard deviation of a zero-padded row, whose padding is overwritten. The second pass goes over
// the row in the L1 cache about the mean of the first, so nothing cancels.
inline void statistics(float* row, int64_t width, float eps, float* mean, float* rstd) {
  const float inverse = 1.0f / static_cast<float>(width);
  const float first = sum(total(padded(width), [&](int64_t column) { return load(row + column); })) * inverse;
  for (int64_t i = width; i < padded(width); ++i) row[i] = first;
  Vector squares[2] = {};
  const Vector deviations = total(padded(width), [&](int64_t column) {
    const Vector deviation = load(row + column) - first;
    squares[(column / kLanes) % 2] += deviation * deviation;
    return deviation;
  });
  const float shift = sum(deviations) * inverse;
  const float variance = sum(squares[0] + squares[1]) * inverse - shift * shift;
  *mean = first + shift;
  *rstd = 1.0f / __builtin_sqrtf((variance > 0 ? variance : 0.0f) + eps);
}

// (row - mean) * rstd as an operand. What it writes into the padding is finite and multiplied by zeros.
inline void set_normalized(Operand* to, const float* row, int64_t width, float mean, float rstd) {
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    set_operand(to + column, (load(row + column) - mean) * rstd);
  }
}

#if defined(MOSA_BF16_PRODUCTS)
inline Bits interleaved(const Operand* even, const Operand* odd) {
  Halves low, high;
  __builtin_memcpy(&low, even, sizeof(low));
  __builtin_memcpy(&high, odd, sizeof(high));
  return __builtin_convertvector(low, Bits) | (__builtin_convertvector(high, Bits) << 16);
}

// Rows `row` and `row` + 1 of the panels of a [kTileRows, width] matrix, interleaved.
inline void set_panel_pair(Operand* panels, int row, const Operand* even_row, const Operand* odd_row, int64_t width) {
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    const Bits pairs = interleaved(even_row + column, odd_row + column);
    __builtin_memcpy(panels + panel_index(kTileRows, row, column), &pairs, sizeof(pairs));
  }
}
#else
inline void set_panel_pair(Operand* panels, int row, const Operand* even_row, const Operand* odd_row, int64_t width) {
  for (int64_t column = 0; column < padded(width); column += kLanes) {
    store(panels + panel_index(kTileRows, row, column), load(even_row + column));
    store(panels + panel_index(kTileRows, row + 1, column), load(odd_row + column));
  }
}
#endif

inline Vector keep_factor(const CpuTileCall& call, int64_t token, int64_t unit) {
  const int64_t group = token / call.rows_per_seed;
  const int64_t first = (token - group * call.rows_per_seed) * call.rank + unit;
  return kept(static_cast<uint32_t>(first), call.seed[group], call.drop_below);
}

template <typename Token>
void forward_tile(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, void* memory) {
  Scratch scratch = {reinterpret_cast<uintptr_t>(memory)};
  const ForwardScratch s(&scratch, call.width, call.rank);
  const int64_t width = call.width, wide = padded(width), narrow = padded(call.rank);
  const Token* x = static_cast<const Token*>(call.x);
  const Token* residual = static_cast<const Token*>(call.residual);
  const int64_t* tokens = tile.tokens;
  const int n = tile.n;
  const Ahead ahead = {{{x, tile.next, tile.next_n, false}, {residual, tokens, n, false}, {call.out, tokens, n, true}},
                       width * static_cast<int64_t>(sizeof(Token))};

  for (int i = 0; i < n; ++i) {
    load_row(x + tokens[i] * width, width, s.row);
    float mean = 0, rstd = 1;
    if (call.rstd != nullptr) {
      statistics(s.row, width, call.norm_eps, &mean, &rstd);
      call.mean[tokens[i]] = mean;
      call.rstd[tokens[i]] = rstd;
    }
    set_normalized(s.u + i * wide, s.row, width, mean, rstd);
  }
  project(n, call.rank, width, s.u, wide, expert.down, s.z, narrow, &ahead);
  for (int i = 0; i < n; ++i) {
    for (int64_t k = 0; k < narrow; k += kLanes) {
      Vector a = activate(call.activation, load(s.z + i * narrow + k) + load(expert.b_down + k), nullptr);
      if (call.dropout) a = select(keep_factor(call, tokens[i], k) != 0.0f, a, Vector{});
      set_operand(s.a + i * narrow + k, a);
    }
  }
  project(n, width, call.rank, s.a, narrow, expert.up, s.y, wide);
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

// Row `row` of the tile: the normalised token and the gradient of the output, as operands.
template <typename Token>
inline void set_backward_row(const CpuTileCall& call, int64_t token, const BackwardScratch& s, int row) {
  const int64_t width = call.width, wide = padded(width);
  const float mean = call.rstd != nullptr ? call.mean[token] : 0.0f;
  const float rstd = call.rstd != nullptr ? call.rstd[token] : 1.0f;
  const Token* x = static_cast<const Token*>(call.x) + token * width;
  const Token* grad_out = static_cast<const Token*>(call.grad_out) + token * width;
  Operand* u = s.u + row * wide;
  Operand* grad = s.grad_out + row * wide;
  const auto set = [&](int64_t column, Vector token_part, Vector grad_part) {
    set_operand(u + column, (token_part - mean) * rstd);
    set_operand(grad + column, grad_part);
    if (call.weights) store(s.columns + column, load(s.columns + column) + grad_part);
  };
  each_vector(
      width, [&](int64_t column) { set(column, load(x + column), load(grad_out + column)); },
      [&](int64_t column, int64_t count) {
        set(column, load_part(x + column, count), load_part(grad_out + column, count));
      });
  for (int64_t column = (width + kLanes - 1) / kLanes * kLanes; column < wide; column += kLanes) {
    set_operand(u + column, Vector{});
    set_operand(grad + column, Vector{});
  }
}

// dx = [g] + rstd * (du - mean(du) - xhat * mean(du * xhat)) with the two means at hand.
template <typename Token>
inline void set_grad_x(const CpuTileCall& call, int64_t token, const float* grad_u, float mean_grad, float slope) {
  const int64_t width = call.width;
  const float mean = call.rstd != nullptr ? call.mean[token] : 0.0f;
  const float rstd = call.rstd != nullptr ? call.rstd[token] : 1.0f;
  const Token* x = static_cast<const Token*>(call.x) + token * width;
  const Token* grad_out = static_cast<const Token*>(call.grad_out) + token * width;
  Token* out = static_cast<Token*>(call.out) + token * width;
  const auto through = [&](int64_t column, Vector token_part, Vector grad_part) {
    Vector v = load(grad_u + column);
    if (call.rstd != nullptr) v = (v - mean_grad - (token_part - mean) * rstd * slope) * rstd;
    return call.add_input ? v + grad_part : v;
  };
  each_vector(
      width, [&](int64_t column) { store(out + column, through(column, load(x + column), load(grad_out + column))); },
      [&](int64_t column, int64_t count) {
        store_part(out + column, through(column, load_part(x + column, count), load_part(grad_out + column, count)),
                   count);
      });
}

// rows [n, padded(rank)] as columns [rank, kTileRows].
inline void set_columns(const Operand* rows, int n, int64_t rank, Operand* columns) {
  for (int64_t k = 0; k < rank; ++k) {
    for (int i = 0; i < n; ++i) columns[k * kTileRows + i] = rows[i * padded(rank) + k];
    if (n % 2 != 0) columns[k * kTileRows + n] = Operand(0);
  }
}

// The sums of a.T @ grad_out, whole or of what the expert owns.
inline void product_with_gradient(const CpuTileCall& call, const BackwardScratch& s, int n, const CpuExpert& expert,
                                  const CpuSums& sums) {
#if defined(MOSA_BF16_PRODUCTS)
  if (expert.owned.starts != nullptr) {
    const int64_t narrow = padded(call.rank);
    if (n % 2 != 0) __builtin_memset(s.a + n * narrow, 0, static_cast<size_t>(narrow) * sizeof(Operand));
    Operand* pairs = s.a_columns;
    for (int i = 0; i < n; i += 2) {
      for (int64_t k = 0; k < narrow; k += kLanes) {
        const Bits both = interleaved(s.a + i * narrow + k, s.a + (i + 1) * narrow + k);
        __builtin_memcpy(pairs + i * narrow + 2 * k, &both, sizeof(both));
      }
    }
    return owned_product(n, call.width, call.rank, pairs, s.grad_out_panels, expert.owned, sums.up, !sums.fresh);
  }
#else
  (void)expert;
#endif
  set_columns(s.a, n, call.rank, s.a_columns);
  product(call.rank, call.width, n, s.a_columns, kTileRows, s.grad_out_panels, kTileRows, sums.up, padded(call.width),
          !sums.fresh);
}

constexpr int kRowsSummed = 12;  // that are added up before a sum takes them: costs a twelfth of what each row would

// Adds the sums over a few rows, which begin anew, and keeps what rounding makes of it (Kahan).
inline void add_rows(float* rows, int64_t count, float* sums, float* excess) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vector before = load(sums + i), added = load(rows + i) - load(excess + i);
    const Vector after = before + added;
    store(excess + i, (after - before) - added);
    store(sums + i, after);
    store(rows + i, Vector{});
  }
}

inline void clear(float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(numbers + i, Vector{});
}

inline bool ends_rows(int i, int n) { return (i + 1) % kRowsSummed == 0 || i + 1 == n; }

template <typename Token>
void backward_tile(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, const CpuSums& sums,
                   void* memory) {
  Scratch scratch = {reinterpret_cast<uintptr_t>(memory)};
  const BackwardScratch s(&scratch, call.width, call.rank);
  const int64_t width = call.width, wide = padded(width), narrow = padded(call.rank);
  const int64_t* tokens = tile.tokens;
  const int n = tile.n;
  const Ahead ahead = {{{call.x, tile.next, tile.next_n, false},
                        {call.grad_out, tile.next, tile.next_n, false},
                        {call.out, tokens, n, true}},
                       width * static_cast<int64_t>(sizeof(Token))};

  if (call.weights) {
    for (float* numbers : {sums.columns, sums.columns_excess, s.columns}) {
      if (sums.fresh || numbers == s.columns) clear(numbers, wide);
    }
    for (float* numbers : {sums.b_down, sums.b_down_excess, s.b_down}) {
      if (sums.fresh || numbers == s.b_down) clear(numbers, narrow);
    }
  }
  for (int i = 0; i < n; ++i) {
    set_backward_row<Token>(call, tokens[i], s, i);
    if (call.weights && ends_rows(i, n)) add_rows(s.columns, wide, sums.columns, sums.columns_excess);
  }
  if (n % 2 != 0) {  // the last token's partner in a pair
    for (int64_t c = 0; c < wide; c += kLanes) set_operand(s.u + n * wide + c, Vector{});
    for (int64_t c = 0; c < wide; c += kLanes) set_operand(s.grad_out + n * wide + c, Vector{});
  }
  for (int i = 0; call.weights && i < n; i += 2) {
    set_panel_pair(s.u_panels, i, s.u + i * wide, s.u + (i + 1) * wide, width);
    set_panel_pair(s.grad_out_panels, i, s.grad_out + i * wide, s.grad_out + (i + 1) * wide, width);
  }
  project(n, call.rank, width, s.u, wide, expert.down, s.z, narrow, call.weights ? nullptr : &ahead);
  project(n, call.rank, width, s.grad_out, wide, expert.up_back, s.grad_a, narrow);

  float mean_grad[kTileRows], slope_grad[kTileRows];  // of du and of du * xhat, as products over the bottleneck
  const float inverse = 1.0f / static_cast<float>(width);
  for (int i = 0; i < n; ++i) {
    Vector along_sums = {}, along_z = {};
    for (int64_t k = 0; k < narrow; k += kLanes) {
      Vector slope;
      const Vector z = load(s.z + i * narrow + k);
      Vector a = activate(call.activation, z + load(expert.b_down + k), &slope);
      Vector grad_z = load(s.grad_a + i * narrow + k) * call.alpha * slope;
      if (call.dropout) {
        const Mask keep = keep_factor(call, tokens[i], k) != 0.0f;
        a = select(keep, a, Vector{});
        grad_z = select(keep, grad_z, Vector{});
      }
      along_sums += grad_z * load(expert.row_sums + k);
      along_z += grad_z * z;
      set_operand(s.a + i * narrow + k, a);
      set_operand(s.grad_z + i * narrow + k, grad_z);
      if (call.weights) store(s.b_down + k, load(s.b_down + k) + grad_z);
    }
    if (call.weights && ends_rows(i, n)) add_rows(s.b_down, narrow, sums.b_down, sums.b_down_excess);
    mean_grad[i] = sum(along_sums) * inverse;
    slope_grad[i] = sum(along_z) * inverse;
  }
  if (call.weights) {
    set_columns(s.grad_z, n, call.rank, s.grad_z_columns);
    product_with_gradient(call, s, n, expert, sums);
    product(call.rank, width, n, s.grad_z_columns, kTileRows, s.u_panels, kTileRows, sums.down, wide, !sums.fresh,
            &ahead);
  }
  if (call.out == nullptr) return;

  project(n, width, call.rank, s.grad_z, narrow, expert.down_back, s.y, wide);
  for (int i = 0; i < n; ++i) set_grad_x<Token>(call, tokens[i], s.y + i * wide, mean_grad[i], slope_grad[i]);
}

void forward(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, void* scratch) {
  if (call.half_tokens) return forward_tile<uint16_t>(call, tile, expert, scratch);
  forward_tile<float>(call, tile, expert, scratch);
}

void backward(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, const CpuSums& sums,
              void* scratch) {
  if (call.half_tokens) return backward_tile<uint16_t>(call, tile, expert, sums, scratch);
  backward_tile<float>(call, tile, expert, sums, scratch);
}

#if defined(MOSA_BF16_PRODUCTS)
constexpr CpuKernels kKernels = {packed_bytes, scratch_bytes, pack,    transpose_blocks, owned_bytes,
                                 pack_owned,   spread_owned,  forward, backward};
#else
constexpr CpuKernels kKernels = {packed_bytes, scratch_bytes, pack,    transpose_blocks, nullptr,
                                 nullptr,      nullptr,       forward, backward};
#endif

}  // namespace
}  // namespace mosa
