#include "masked_adamw.h"

#include <algorithm>
#include <vector>

#include "masked_adamw_math.h"
#include "parallel.h"

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

// Some entries as floats.
struct Floats {
  float* param;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
};

// All of them by one move.
void advance_alike(Floats at, int count, AdamWMove move, float decay, const AdamWOptions& o) {
  for (int i = 0; i < count; ++i) {
    const AdamWEntry entry = advance({at.param[i], at.exp_avg[i], at.exp_avg_sq[i]}, at.grad[i], move, decay, o);
    at.param[i] = entry.param;
    at.exp_avg[i] = entry.exp_avg;
    at.exp_avg_sq[i] = entry.exp_avg_sq;
  }
}

// By its bits, without the branch that compilers make of a choice.
inline float choose(uint32_t all_ones_or_zero, float a, float b) {
  return bits_to_float((float_to_bits(a) & all_ones_or_zero) | (float_to_bits(b) & ~all_ones_or_zero));
}

// Each by its own move. Chosen, not multiplied: what stands still does so bit by bit, whatever its gradient holds.
void advance_each(Floats at, int count, const float* step_size, const float* root_scale, float decay,
                  const AdamWOptions& o) {
  for (int i = 0; i < count; ++i) {
    const AdamWEntry old = {at.param[i], at.exp_avg[i], at.exp_avg_sq[i]};
    const AdamWEntry entry = advance(old, at.grad[i], {step_size[i], root_scale[i]}, decay, o);
    const uint32_t moving = 0u - static_cast<uint32_t>(root_scale[i] != 0.0f);
    at.param[i] = choose(moving, entry.param, old.param);
    at.exp_avg[i] = choose(moving, entry.exp_avg, old.exp_avg);
    at.exp_avg_sq[i] = choose(moving, entry.exp_avg_sq, old.exp_avg_sq);
  }
}

// The entries [first, first + count) of a tensor, at most kPiece, which share a move if they have no owners.
void advance_piece(const AdamWTensor& t, int64_t first, int count, int expert, const Moves& moves, float decay,
                   const AdamWOptions& options) {
  float step_size[kPiece], root_scale[kPiece];
  if (t.owner != nullptr && moves.alike) {  // a comparison, which is vector code, where a look-up is not
    const float step = moves.step_size[moves.first], root = moves.root_scale[moves.first];
    for (int i = 0; i < count; ++i) {
      const uint32_t place = static_cast<uint32_t>(t.owner[first + i]) - static_cast<uint32_t>(moves.first);
      step_size[i] = step;
      root_scale[i] = choose(0u - static_cast<uint32_t>(place < static_cast<uint32_t>(moves.count)), root, 0.0f);
    }
  } else if (t.owner != nullptr) {
    for (int i = 0; i < count; ++i) {
      const uint8_t owner = t.owner[first + i];
      step_size[i] = moves.step_size[owner];
      root_scale[i] = moves.root_scale[owner];
    }
  }
  const auto run = [&](Floats at) {
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
  for (int i = 0; i < count; ++i) {
    param[i] = load_float(t.param, t.dtype, first + i);
    grad[i] = load_float(t.grad, t.dtype, first + i);
    exp_avg[i] = load_float(t.exp_avg, t.dtype, first + i);
    exp_avg_sq[i] = load_float(t.exp_avg_sq, t.dtype, first + i);
  }
  run({param, grad, exp_avg, exp_avg_sq});
  for (int i = 0; i < count; ++i) {
    if (t.owner != nullptr && root_scale[i] == 0.0f) continue;  // its bits may be those of a NaN
    store_float(t.param, t.dtype, first + i, param[i]);
    store_float(t.exp_avg, t.dtype, first + i, exp_avg[i]);
    store_float(t.exp_avg_sq, t.dtype, first + i, exp_avg_sq[i]);
  }
}

void advance_item(const AdamWTensor& t, int64_t first, int64_t last, const Moves& moves, float decay,
                  const AdamWOptions& options) {
  const bool one_part = t.owner != nullptr || (moves.alike && moves.count == t.experts);
  const int64_t part = one_part ? t.size : t.size / t.experts;
  while (first < last) {
    const int64_t expert = first / part;
    const int64_t end = std::min({last, first + kPiece, (expert + 1) * part});
    if (t.owner != nullptr || moves.root_scale[expert] != 0.0f) {
      advance_piece(t, first, static_cast<int>(end - first), static_cast<int>(expert), moves, decay, options);
    }
    first = end;
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
    advance_item(t, first, std::min<int64_t>(first + kItem, t.size), moves[n], decay, options);
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
