// What kernels leave out: units of the bottleneck and tiles of w_up of which an expert owns nothing (AdapterOwned).
#pragma once

#include <cstdint>

#include "adapter_memory.h"
#include "adapter_plain.h"
#include "adapter_units.h"

namespace mosa {

// The units that stand in the slots of a kernel's bottleneck: as they come, or those listed for an expert.
template <bool kListed>
struct UnitsOf {
  __device__ UnitsOf(const AdapterParams&, int) {}
  __device__ int of(int slot) const { return slot; }
};

template <>
struct UnitsOf<true> {
  const int16_t* lists;  // lies with the kernel's parameters, and takes no register
  int first;             // in the lists; below 0: ~first is a unit, and the others follow it

  // The merged adapter has no list, and an expert beyond them owns nothing.
  __device__ UnitsOf(const AdapterParams& p, int e) : lists(p.owned.units) {
    first = e < 0 ? e : e < p.owned.experts ? e * p.owned.listed : ~p.rank;
  }
  __device__ int of(int slot) const { return first < 0 ? ~first + slot : lists[first + slot]; }
};

// The units of a thread's rows of a tile, which stay the same from step to step.
template <bool kListed, int kCount>
struct RowUnits {
  template <typename Spread>
  __device__ void find(const Spread&, const UnitsOf<kListed>&) {}
  __device__ int of(int, int row) const { return row; }
};

template <int kCount>
struct RowUnits<true, kCount> {
  int unit[kCount];

  template <typename Spread>
  __device__ void find(const Spread& spread, const UnitsOf<true>& units) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) unit[j] = spread.has(j) ? units.of(spread.row(j)) : 0;
  }
  __device__ int of(int j, int) const { return unit[j]; }
};

// Eight units of a row of w_up: neighbours, which are loaded together, or any.
template <bool kListed>
struct VectorUnits {
  __device__ void find(const UnitsOf<kListed>&, int) {}

  // What `load` takes for a row that is there: the units that are left.
  template <typename Params>
  __device__ static int limit(const Params& p, int column) {
    return units_from(p, column);
  }
  template <int kWords, typename Tensor>
  __device__ RawOf<kWords> load(const Tensor& from, int64_t row, int column, int left) const {
    return load_raw<kWords>(from.data, from.dtype, from.wide, row + column, left);
  }
  __device__ Owners load(const uint8_t* owners, bool wide, int64_t row, int column, int left) const {
    return load_owners(owners, wide, row + column, left);
  }
};

template <>
struct VectorUnits<true> {
  uint32_t pair[kVector / 2];  // a unit in each half

  __device__ int of(int i) const { return static_cast<int>((pair[i / 2] >> (16 * (i % 2))) & 0xffffu); }
  __device__ void find(const UnitsOf<true>& units, int slot) {
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      pair[i] = static_cast<uint32_t>(units.of(slot + 2 * i)) | static_cast<uint32_t>(units.of(slot + 2 * i + 1)) << 16;
    }
  }

  template <typename Params>
  __device__ static int limit(const Params& p, int) {
    return p.rank;
  }
  // Zeros for units from `rank` on: for all of them where it is 0.
  template <int kWords, typename Tensor>
  __device__ RawOf<kWords> load(const Tensor& from, int64_t row, int, int rank) const {
    RawOf<kWords> raw = {};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int unit = of(i);
      if (unit >= rank) continue;
      if (kWords == 8 && from.dtype == kFloat32) {
        raw.word[i % kWords] = static_cast<const uint32_t*>(from.data)[row + unit];
      } else {
        const uint32_t bits = static_cast<const uint16_t*>(from.data)[row + unit];
        raw.word[i / 2] |= bits << (16 * (i % 2));
      }
    }
    return raw;
  }
  __device__ Owners load(const uint8_t* from, bool, int64_t row, int, int rank) const {
    Owners owners = {{~0u, ~0u}};
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int unit = of(i);
      const uint32_t shift = 8 * (i % 4);
      if (unit >= rank) continue;
      owners.word[i / 4] = (owners.word[i / 4] & ~(0xffu << shift)) | static_cast<uint32_t>(from[row + unit]) << shift;
    }
    return owners;
  }
};

// Whether a kernel looks at the table of tiles for tokens of expert e: the merged adapter needs them all.
template <int kRank, bool kListed, typename Params>
__device__ inline bool leaves_out_tiles(const Params& p, int e) {
  if constexpr (kListed || kRank <= kNarrowRank || kIsPlain<Params>) return false;
  return p.owned.tiles != nullptr && e >= 0;
}

// Row e of the table of tiles from a column on; zeros beyond its ends.
struct OwnedTiles {
  const uint16_t* row;
  int left;

  __device__ OwnedTiles(const AdapterParams& p, int e, int column) : row(nullptr), left(0) {
    const int tiles = (p.width + kUnit - 1) / kUnit;
    if (e >= p.owned.experts) return;
    row = p.owned.tiles + static_cast<int64_t>(e) * tiles + column / kUnit;
    left = tiles - column / kUnit;
  }
  __device__ uint32_t units(int tile) const { return tile < left ? row[tile] : 0u; }
};

// For products with w_up whose depth is the units and whose kTiles tiles are of columns.
template <int kTiles>
struct TilesByUnit {
  static constexpr bool kSome = true;
  uint32_t units[kTiles];

  __device__ explicit TilesByUnit(const OwnedTiles& owned) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) units[j] = owned.units(j);
  }
  __device__ uint32_t of(int k) const {
    uint32_t marked = 0;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) marked |= (units[j] >> k & 1u) << j;
    return marked;
  }
};

// For those whose depth is the columns and whose tiles are of units, from the given one on.
template <int kTiles>
struct TilesByColumn {
  static constexpr bool kSome = true;
  OwnedTiles owned;
  int first;
  __device__ uint32_t of(int k) const { return owned.units(k) >> first & ((1u << kTiles) - 1u); }
};

// For products that lead to a tile of w_up: kTiles of columns, in one of units, whatever the depth.
template <int kTiles>
struct TilesOfResult {
  static constexpr bool kSome = true;
  uint32_t marked = 0;

  __device__ TilesOfResult(const OwnedTiles& owned, int unit_tile) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) marked |= (owned.units(j) >> unit_tile & 1u) << j;
  }
  __device__ uint32_t of(int) const { return marked; }
};

}  // namespace mosa
