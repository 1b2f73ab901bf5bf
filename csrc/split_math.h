// The owner of one entry, shared by split.cpp and split.cu; mosa_kernels/backends/split.py says the same in PyTorch.
#pragma once

#include "counter_hash.h"
#include "split.h"

namespace mosa {

// Of the card shuffle "swap or not" (Hoang, Morris and Rogaway, CRYPTO 2012). With 24 rounds of true randomness the
// permutations of 2 to 6 units are uniform to within 9e-6 (total variation, computed exactly); a round takes off 40%.
constexpr uint32_t kSplitRounds = 24;

// The random permutation of the units of one line.
struct LineShuffle {
  DrawKey key;
  uint32_t units;
  uint32_t mirrors[kSplitRounds];
};

MOSA_HOST_DEVICE inline uint32_t split_line(const SplitParams& params, int64_t i, int64_t j) {
  return static_cast<uint32_t>(i * params.line_per_row + j * params.line_per_column);
}

MOSA_HOST_DEVICE inline LineShuffle line_shuffle(const SplitParams& params, DrawKey seed, uint32_t line) {
  LineShuffle shuffle;
  shuffle.key = {draw(seed, 2 * line), draw(seed, 2 * line + 1)};
  shuffle.units = static_cast<uint32_t>(params.units);
  for (uint32_t round = 0; round < kSplitRounds; ++round) {
    shuffle.mirrors[round] =
        static_cast<uint32_t>((static_cast<uint64_t>(draw(shuffle.key, round)) * shuffle.units) >> 32);
  }
  return shuffle;
}

MOSA_HOST_DEVICE inline uint32_t split_unit(const SplitParams& params, int64_t i, int64_t j) {
  return static_cast<uint32_t>(i / params.side * params.unit_per_row + j / params.side * params.unit_per_column);
}

// Where one round takes a place. Places are paired by a random mirror; a coin that both of a pair share decides whether
// they swap.
MOSA_HOST_DEVICE inline uint32_t shuffle_round(const LineShuffle& shuffle, uint32_t round, uint32_t place) {
  const uint32_t mirror = shuffle.mirrors[round];
  const uint32_t partner = mirror >= place ? mirror - place : mirror + (shuffle.units - place);
  const uint32_t pair = place > partner ? place : partner;
  const uint32_t coin = draw(shuffle.key, kSplitRounds + round * shuffle.units + pair) >> 31;
  return coin != 0 ? partner : place;
}

MOSA_HOST_DEVICE inline uint8_t owner_at(const SplitParams& params, uint32_t place) {
  return static_cast<uint8_t>(static_cast<uint64_t>(place) * static_cast<uint32_t>(params.experts) /
                              static_cast<uint32_t>(params.units));
}

}  // namespace mosa
