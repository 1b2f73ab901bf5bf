// What adapter_cpu.cpp asks of the code for one instruction set: packing an expert's weights, and one tile of tokens.
// Plain pointers only: the sources behind it are compiled for CPUs that may not be this one, so they share no inline
// function with the rest of the module.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mosa {

// With 768 columns and rank 64 a tile and its weights take 0.7 MB of L2. 72 and 96 rows are as fast on two threads.
// Products take six rows at once, sparse ones eight.
constexpr int kTileRows = 48;
constexpr int kPad = 16;  // columns of fp32 scratch come in multiples of it

static constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct CpuOwner {
  const uint8_t* assignment;  // [width, rank]
  int id;
  int64_t width;
  int64_t rank;
};

// The entries of the up projection that one expert owns: each of 16 neighbouring columns lists its units, chunk by
// chunk of kPad units of the bottleneck, in slots. A null pointer stands for the whole matrix.
struct CpuOwned {
  const int32_t* starts;  // [padded(width) / 16 * chunks + 1] of the slots of 16 columns and a chunk
  const int32_t* units;   // [slots, 16], or -1
  int64_t chunks;
};

// One expert's projections, packed for the matrix products.
struct CpuExpert {
  float* up_rows;      // [width, padded(rank)] w_up_e, or null: not kept
  float* b_down;       // [padded(rank)] b_down + w_down_e @ beta
  float* row_sums;     // [padded(rank)] of w_down_e * gamma
  float* b_up;         // [padded(width)] b_up_e, zeros without one
  void* down;          // packed [width, rank]: x to bottleneck
  void* up;            // packed [rank, width]: bottleneck to output
  void* down_back;     // packed [rank, width]: gradient of the bottleneck to that of x
  void* up_back;       // packed [width, rank]: gradient of the output to that of the bottleneck
  void* owned_memory;  // for pack_owned, or null
  CpuOwned owned;
};

// One expert's sums over a run of tiles. Rows stand padded(width) apart.
struct CpuSums {
  float* up;       // [rank, padded(width)] a.T @ grad_out, or [slots, 16] of what the expert owns
  float* down;     // [rank, padded(width)] grad_z.T @ normalised x
  float* b_down;   // [padded(rank)] column sums of grad_z
  float* columns;  // [padded(width)] column sums of grad_out
  // What rounding has added to the last two: a sum of thousands of numbers one by one is off by far more than eager
  // PyTorch's (x 4.7 at 12,608 tokens, x 18 at 200,000).
  float* b_down_excess;
  float* columns_excess;
  bool fresh;  // holds nothing yet
};

struct CpuTileCall {
  const void* x;
  const void* residual;
  const void* grad_out;
  void* out;    // forward: the output; backward: the gradient of x or null
  float* mean;  // forward: written, backward: read; null without a norm
  float* rstd;
  const int64_t* seed;
  int64_t rows_per_seed;
  int64_t width;
  int64_t rank;
  float scale;
  float alpha;  // scale / (1 - p)
  float norm_eps;
  uint32_t drop_below;
  uint8_t activation;
  bool dropout;
  bool half_tokens;  // x, residual, grad_out and out are bf16, else fp32
  bool add_input;
  bool weights;  // backward: whether the sums over tokens are wanted
};

struct CpuTile {
  const int64_t* tokens;  // [n] indices
  int n;
  const int64_t* next;  // [next_n] of the tile that the same thread takes next
  int next_n;
};

struct CpuKernels {
  size_t (*packed_bytes)(int64_t k, int64_t n);  // of a [k, n] matrix
  size_t (*scratch_bytes)(int64_t width, int64_t rank, bool backward);
  // Packs B [k, n] from its rows, or (transposed) from those of its transpose [n, k], padded with zeros to `stride`
  // elements, a multiple of kPad. Sparse: entries other than zero may be few enough to be multiplied alone.
  void (*pack)(const float* rows, int64_t stride, int64_t k, int64_t n, bool transposed, bool sparse, void* packed);
  // to [columns, rows] = from [rows, columns].T, in blocks of kPad x kPad.
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                    int64_t to_stride);
  // Null where owned entries are not multiplied apart from others. False where that would be slower.
  size_t (*owned_bytes)(int64_t width, int64_t rank);
  bool (*pack_owned)(const CpuOwner& owner, void* memory, CpuOwned* owned);
  // From sums [slots, 16] of one group and its chunks from `first` to `last`: rows of its 16 columns, zeros elsewhere.
  void (*spread_owned)(const CpuOwner& owner, const CpuOwned& owned, int64_t group, int64_t first, int64_t last,
                       const float* sums, float* to, int64_t to_stride);
  void (*forward)(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, void* scratch);
  void (*backward)(const CpuTileCall& call, const CpuTile& tile, const CpuExpert& expert, const CpuSums& sums,
                   void* scratch);
};

// Null where the compiler could not build them.
const CpuKernels* cpu_kernels_portable();
const CpuKernels* cpu_kernels_avx2();
const CpuKernels* cpu_kernels_avx512();
const CpuKernels* cpu_kernels_avx512_bf16();

}  // namespace mosa
