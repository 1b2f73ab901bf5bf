#include "masked_adamw.h"

#include <algorithm>
#include <vector>

#include "float_rows.h"
#include "masked_adamw_math.h"
#include "parallel.h"
#include "vector_code.h"

namespace mosa {
namespace {

constexpr uint32_t kItem = 8192;                // entries that a thread takes at a time
constexpr int kPiece = 512;                     // whose working copies stay in the first cache
constexpr int64_t kEntriesOfOneThread = 32768;  // below, waking the other threads costs more than they save
constexpr int kOwners = 256;

// The moves of a tensor's experts, and of owners that are no expert, which stand still.
struct Moves {
  float step_size[kOwners];
  float root_scale[kOwners];
  bool any;          // whether anything moves
  bool alike;        // whether what moves belongs to experts in a row, which move alike
  int first, count;  // these experts
};

Moves moves_of(const AdamWTensor& t, float lr, const AdamWOptions& options) {
  Moves found = {};
  found.alike = true;
  for (int e = 0; e < t.experts; ++e) {
    const AdamWMove move = move_of(t, e, lr, options);
    found.step_size[e] = move.step_size;
    found.root_scale[e] = move.root_scale;
    if (move.root_scale == 0.0f) continue;
    if (!found.any) found.first = e;
    found.any = true;
    found.alike = found.alike && found.first + found.count == e && move.step_size == found.step_size[found.first] &&
                  move.root_scale == found.root_scale[found.first];
    ++found.count;
  }
  return found;
}

// Some entries as floats, each kind in its own memory.
struct Floats {
  float* __restrict param;
  const float* __restrict grad;
  float* __restrict exp_avg;
  float* __restrict exp_avg_sq;
};

// All of them by one move. What follows is inlined by force: each instruction set has its own vector code of it.
[[gnu::always_inline]] inline void advance_alike(Floats at, int count, AdamWMove move, float decay,
                                                 const AdamWOptions& o) {
  for (int i = 0; i < count; ++i) {
    const AdamWEntry entry = advance({at.param[i], at.exp_avg[i], at.exp_avg_sq[i]}, at.grad[i], move, decay, o);
    at.param[i] = entry.param;
    at.exp_avg[i] = entry.exp_avg;
    at.exp_avg_sq[i] = entry.exp_avg_sq;
  }
}

// Each by its own move. Chosen, not multiplied: what stands still does so bit by bit, whatever its gradient holds.
[[gnu::always_inline]] inline void advance_each(Floats at, int count, const float* __restrict step_size,
                                                const float* __restrict root_scale, float decay,
                                                const AdamWOptions& o) {
  for (int i = 0; i < count; ++i) {
    const AdamWEntry old = {at.param[i], at.exp_avg[i], at.exp_avg_sq[i]};
    const AdamWEntry entry = advance(old, at.grad[i], {step_size[i], root_scale[i]}, decay, o);
    const bool moving = root_scale[i] != 0.0f;
    at.param[i] = choose(moving, entry.param, old.param);
    at.exp_avg[i] = choose(moving, entry.exp_avg, old.exp_avg);
    at.exp_avg_sq[i] = choose(moving, entry.exp_avg_sq, old.exp_avg_sq);
  }
}

// What each entry's owner does.
[[gnu::always_inline]] inline void moves_of_entries(const AdamWTensor& t, int64_t first, int count, const Moves& moves,
                                                    float* step_size, float* root_scale) {
  if (!moves.alike) {
    for (int i = 0; i < count; ++i) {
      const uint8_t owner = t.owner[first + i];
      step_size[i] = moves.step_size[owner];
      root_scale[i] = moves.root_scale[owner];
    }
    return;
  }
  const float step = moves.step_size[moves.first], root = moves.root_scale[moves.first];
  const auto begin = static_cast<uint32_t>(moves.first), experts = static_cast<uint32_t>(moves.count);
  for (int i = 0; i < count; ++i) {  // a comparison, which is vector code, where a look-up is not
    step_size[i] = step;
    root_scale[i] = choose(t.owner[first + i] - begin < experts, root, 0.0f);
  }
}

// The entries [first, first + count) of a tensor, at most kPiece; without owners they are of one expert.
[[gnu::always_inline]] inline void advance_piece(const AdamWTensor& t, int64_t first, int count, int expert,
                                                 const Moves& moves, float decay, const AdamWOptions& options) {
  float step_size[kPiece], root_scale[kPiece];
  if (t.owner != nullptr) moves_of_entries(t, first, count, moves, step_size, root_scale);
  const auto run = [&](Floats at) __attribute__((always_inline)) {
    if (t.owner == nullptr) {
      advance_alike(at, count, {moves.step_size[expert], moves.root_scale[expert]}, decay, options);
    } else {
      advance_each(at, count, step_size, root_scale, decay, options);
    }
  };
  if (t.dtype == kFloat32) {
    run({static_cast<float*>(t.param) + first, static_cast<const float*>(t.grad) + first,
         static_cast<float*>(t.exp_avg) + first, static_cast<float*>(t.exp_avg_sq) + first});
    return;
  }
  float param[kPiece], grad[kPiece], exp_avg[kPiece], exp_avg_sq[kPiece];
  load_floats(t.param, t.dtype, first, count, param);
  load_floats(t.grad, t.dtype, first, count, grad);
  load_floats(t.exp_avg, t.dtype, first, count, exp_avg);
  load_floats(t.exp_avg_sq, t.dtype, first, count, exp_avg_sq);
  run({param, grad, exp_avg, exp_avg_sq});
  const auto store = [&](void* data, const float* from) __attribute__((always_inline)) {
    if (t.owner == nullptr) return store_floats(data, t.dtype, first, count, from);
    uint16_t rounded[kPiece];
    store_floats(rounded, t.dtype, 0, count, from);
    auto* to = static_cast<uint16_t*>(data) + first;
    for (int i = 0; i < count; ++i) {  // what stands still keeps its bits, which may be those of a NaN
      to[i] = static_cast<uint16_t>(choose(root_scale[i] != 0.0f, uint32_t{rounded[i]}, uint32_t{to[i]}));
    }
  };
  store(t.param, param);
  store(t.exp_avg, exp_avg);
  store(t.exp_avg_sq, exp_avg_sq);
}

// The entries [first, last) of a tensor.
struct Run {
  const AdamWTensor& tensor;
  const Moves& moves;
  float decay;
  const AdamWOptions& options;
  int64_t first, last;
};

[[gnu::always_inline]] inline void advance_run(const Run& run) {
  const AdamWTensor& t = run.tensor;
  const Moves& moves = run.moves;
  const bool one_part = t.owner != nullptr || (moves.alike && moves.count == t.experts);
  const int64_t part = one_part ? t.size : t.size / t.experts;
  for (int64_t first = run.first, end; first < run.last; first = end) {
    const int64_t expert = first / part;
    end = std::min({run.last, first + kPiece, (expert + 1) * part});
    if (t.owner == nullptr && moves.root_scale[expert] == 0.0f) continue;
    advance_piece(t, first, static_cast<int>(end - first), static_cast<int>(expert), moves, run.decay, run.options);
  }
}

}  // namespace

int masked_adamw_cpu(const AdamWParams& params, int threads) {
  if (params.count < 0) return kNegativeSize;
  if (params.count > 0 && params.tensors == nullptr) return kMissingPointer;
  for (int32_t n = 0; n < params.count; ++n) {
    const int status = check_adamw_tensor(params.tensors[n]);
    if (status != kOk) return status;
  }
  const AdamWOptions& options = params.options;
  const float lr = static_cast<float>(options.lr_value);
  const float decay = static_cast<float>(1.0 - options.lr_value * options.weight_decay);
  std::vector<Moves> moves;
  std::vector<int64_t> starts = {0};  // the first item of each tensor
  int64_t entries = 0;
  for (int32_t n = 0; n < params.count; ++n) {
    const AdamWTensor& t = params.tensors[n];
    moves.push_back(moves_of(t, lr, options));
    starts.push_back(starts.back() + (moves.back().any ? (static_cast<int64_t>(t.size) + kItem - 1) / kItem : 0));
    entries += moves.back().any ? t.size : 0;
  }
  parallel_for(starts.back(), entries < kEntriesOfOneThread ? 1 : threads, [&](int64_t item) {
    const auto n = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), item) - starts.begin() - 1);
    const AdamWTensor& t = params.tensors[n];
    const int64_t first = (item - starts[n]) * kItem;
    const int64_t last = std::min<int64_t>(first + kItem, t.size);
    run_in_vector_code<advance_run>(Run{t, moves[n], decay, options, first, last});
  });
  for (int32_t n = 0; n < params.count; ++n) {
    const AdamWTensor& t = params.tensors[n];
    for (int e = 0; e < t.experts; ++e) {
      if (mosa::moves(t, e)) t.steps[e] += 1.0f;
    }
  }
  return kOk;
}

}  // namespace mosa
