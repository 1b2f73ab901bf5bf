// The adapter on a GPU (arXiv 2312.02923, Eq. 1, 2 and 5), one launch forward and at most three backward.
//
//   u = LayerNorm(x)    z = u @ w_down_e.T + b_down    h = dropout(act(z))
//   out = [x] + [residual] + scale * (h @ w_up_e.T + b_up_e)
//
// Where a call may have tokens of experts with lists and merged ones, either kind has a launch of its own, forward and
// backward (adapter_served.h).
//
// Forward. A block owns a tile of tokens and passes twice over its columns. The first pass multiplies the raw x with
// Wg = gamma o w_down on the matrix units while it gathers LayerNorm's statistics as shifted sums, since
//   LayerNorm(x) w_down^T = rstd (x Wg^T - mean s) + w_down beta,    s = Wg 1 from the rounded Wg.
// Where x has to be converted anyway (float32 x), the shift is taken off first. The bottleneck h stays in shared
// memory; the second pass multiplies it with the entries of w_up that the tile's expert owns, the owner's byte being
// compared on the loaded tile. A tile with tokens of several experts repeats the second pass for each.
//
// Backward over tokens. With da the gradient of z, and c1 = da s / d, c2 = da (z - bias) / d,
//   dx = dout + rstd * (da Wg - c1 - xhat c2),
// so LayerNorm needs no reduction over d. Leaves h and da, [T, padded r] each, for the next launch.
// Backward over weights. A block owns columns, a run of tokens and one projection; with G = da^T xhat over its run
//   dw_down = G o gamma + db_down (x) beta    dgamma = sum_k w_down o G    dbeta = w_down^T db_down
//   dw_up = scale dout^T h                    db_up = scale sum dout
// in the entries that the tokens' experts own. The gradient of the scale is <h, dout w_up_e>, which the launch over
// tokens has before h is rounded, and <b_up, sum dout>. Every block writes its own float32 part, which a third launch
// adds up in fixed order: no atomics, the same bits on every run.
//
// Backward over tokens and weights at once, on request (`one_launch`): adapter_backward_cluster_kernel.h.
//
// What an expert owns nothing of is left out where the assignment is such that this pays (AdapterOwned). Plain calls
// have forward and backward kernels over tokens of their own (adapter_plain.h).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace mosa {

constexpr int kMaxAdapterWidth = 4096;
constexpr int kMaxAdapterRank = 256;
constexpr int kMergedExpert = -1;
constexpr int kOwnerOfNothing = 255;  // there are at most 255 experts

enum AdapterActivation : uint8_t {
  kAdapterGelu = 0,
  kAdapterGeluTanh = 1,
  kAdapterRelu = 2,
  kAdapterSilu = 3,
  kAdapterIdentity = 4,
  kAdapterActivationCount = 5
};

// A tensor with neighbouring columns; null: not given.
struct AdapterTensor {
  const void* data;
  int64_t stride;  // elements between rows
  uint8_t dtype;   // of dtype.h
  bool wide;       // every row begins at a multiple of 16 bytes; set by the launchers
};

// One id or seed for each of `groups` equal runs of tokens, in the GPU's memory; null: one value for all tokens.
struct AdapterGroups {
  const void* data;
  int64_t value;   // for all tokens, without data
  int32_t groups;  // 1 without data
  int32_t tokens;  // in a group; set by the launchers
  bool is_int64;   // else int32
};

// What the experts own anything of, read off the assignment by the caller; at most one of the tables is given.
//
// units: an expert that owns nothing of a unit of the bottleneck gets nothing from it and gives it no gradient. Kernels
// for a smaller bottleneck multiply the listed units alone, in both projections; merged tokens, which need all units,
// take a second launch over tokens. Of the products of a pass, 1 / N is left where an expert owns whole units.
// tiles: of w_up's products (half of the forward pass, two fifths of the backward pass), the kernels for r above
// kNarrowRank leave out those of 16 x 16 tiles of which the expert owns nothing.
// Output features that experts own whole are in neither: every tile has some of each expert, and products count in
// tiles.
struct AdapterOwned {
  const int16_t* units;   // [experts, listed] of each expert, filled up with rank or more; null: all in order
  const uint16_t* tiles;  // [experts, ceil(width / 16)]: bit u of entry c for columns 16 c and units 16 u on; null: all
  int32_t experts;        // ids beyond own nothing
  int32_t listed;         // a padded rank below that of the whole
};
constexpr int kNarrowRank = 64;  // up to here the memory's bandwidth sets the time (counted)

// Whose tokens a launch serves.
enum AdapterServed : uint8_t { kServeAll = 0, kServeExperts = 1, kServeMerged = 2 };

struct AdapterParams {
  AdapterTensor x;                 // [tokens, width]
  AdapterTensor residual;          // like x, or null
  AdapterTensor w_down;            // [rank, width]
  AdapterTensor w_down_init;       // [rank, width], with assignment_down
  AdapterTensor b_down;            // [rank] or null
  AdapterTensor w_up;              // [width, rank]
  AdapterTensor b_up;              // [bias_rows, width], [width] where bias_rows is 0, or null
  AdapterTensor gamma;             // [width]; null: no LayerNorm
  AdapterTensor beta;              // [width] or null
  AdapterTensor scale;             // [] or null: scale_value
  const uint8_t* assignment;       // [width, rank] or null: dense
  const uint8_t* assignment_down;  // [rank, width] or null: dense
  AdapterGroups expert;            // kMergedExpert: the merged adapter
  AdapterGroups seed;              // of the dropout mask
  AdapterOwned owned;

  int32_t tokens;
  int32_t width;
  int32_t rank;
  int32_t bias_rows;

  float scale_value;
  float expert_scale;
  float merged_scale;
  float norm_eps;
  float keep_scale;         // 1 / (1 - p)
  uint32_t drop_threshold;  // 0: no dropout

  uint8_t activation;
  uint8_t product_dtype;  // of the operands of the matrix products
  bool add_input;
  bool tf32;  // float32 products by one TF32 product in place of three

  AdapterServed served;  // set by the launchers
  bool wide_assignment;  // rows begin at multiples of 8 bytes; set by the launchers
  bool wide_assignment_down;
};

struct AdapterForward {
  void* out;    // [tokens, width] contiguous, dtype of x
  float* mean;  // [tokens]; with gamma
  float* rstd;  // [tokens]; with gamma
  bool wide_out;
};

// A gradient to be written, contiguous; null: not wanted.
struct AdapterGradient {
  void* data;
  uint8_t dtype;
};

struct AdapterBackward {
  AdapterTensor grad_out;  // [tokens, width]
  const float* mean;       // [tokens]; with gamma
  const float* rstd;
  AdapterGradient x;  // dtype of x
  AdapterGradient w_down;
  AdapterGradient b_down;
  AdapterGradient w_up;
  AdapterGradient b_up;
  AdapterGradient gamma;
  AdapterGradient beta;
  AdapterGradient scale;
  float* activity;          // [activity_rows]: 1 for each expert that ran
  int32_t activity_rows;    //
  int32_t multiprocessors;  // of the device
  bool one_launch;          // over tokens and weights, where the shapes and the device allow it
  void* workspace;          // adapter_backward_workspace bytes
  int64_t workspace_bytes;  //
  bool wide_dx;
};

// How the weight gradients are split before they are added up. A part, in floats: w_down [r, d], w_up [r, d] (not
// [d, r]), gamma [d], beta [d], b_up [rows, d], b_down [r], scale [column_blocks]; begin_* says where each begins.
struct AdapterParts {
  bool down;  // whether any gradient on the side of w_down is wanted
  bool up;
  int32_t column_blocks;
  int32_t number;
  int32_t tokens;  // in one part
  int64_t begin_up;
  int64_t begin_gamma;
  int64_t begin_beta;
  int64_t begin_b_up;
  int64_t begin_b_down;
  int64_t begin_scale;
  int64_t length;
};
AdapterParts adapter_parts(const AdapterParams& params, const AdapterBackward& backward);

// What the launches over tokens leave for the one over weights, [tokens, padded rank] each in the products' dtype;
// null: not wanted. With lists of units, a token's row begins with the units listed for its expert.
struct TokenBuffers {
  void* h;
  void* da;
  float* scale;    // [blocks], a block's <h, dout w_up_e>
  int32_t stride;  // elements in a row
};

// Bytes that adapter_backward needs; 0 where no gradient of a weight is wanted.
int64_t adapter_backward_workspace(const AdapterParams& params, const AdapterBackward& backward);

// Whether adapter_backward takes one launch over tokens and weights on the current device.
bool adapter_backward_in_one_launch(const AdapterParams& params, const AdapterBackward& backward);

// Checks what the launchers rely on and sets what they set; returns a Status.
int prepare_adapter(AdapterParams* params);

// In place of a stream: the kernels of a call are loaded, and not launched. Drivers before 12.3 load none while a graph
// is captured, and the graph may not take those that the call took before: it has no tables (`AdapterOwned`).
inline void* load_only() { return reinterpret_cast<void*>(~uintptr_t{0}); }

// Both enqueue on `stream` (a cudaStream_t) of the current device and return a Status or a cudaError_t.
int adapter_forward(const AdapterParams& params, const AdapterForward& forward, void* stream);
int adapter_backward(const AdapterParams& params, const AdapterBackward& backward, void* stream);

}  // namespace mosa
