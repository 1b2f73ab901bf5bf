#include "adapter_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "adapter_cpu_gradients.h"
#include "adapter_cpu_tile.h"
#include "parallel.h"
#include "status.h"
#include "vector_code.h"

namespace mosa {
namespace {

// Multiplications below which waking the other threads costs more than they save. All of them or none: a team of
// another size than the last makes the OpenMP runtime end threads and start new ones.
constexpr int64_t kProductsOfOneThread = 8'000'000;
// Runs of tiles that sum weight gradients on their own: this many, which most numbers of threads share evenly, for more
// threads the next power of two, and for few tiles a smaller one. Up to so many threads results do not depend on them.
constexpr int kRuns = 8;
constexpr int kMaxRuns = 64;  // their sums are added up in the end

// Tokens of an expert from which on it pays to list what it owns. Of four experts, beside dense products: with 30
// tokens 3 % slower, with 50 as fast, with 100 5 to 9 % faster, with 200 8 to 12 % (d 768, r 64, bf16).
constexpr int64_t kSparseTokens = 40;

const CpuKernels* kernels_of(InstructionSet set) {
  if (set == kPortable) return cpu_kernels_portable();
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  __builtin_cpu_init();
  if (set == kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? cpu_kernels_avx2() : nullptr;
  }
  if (set == kAvx512) return has_avx512() ? cpu_kernels_avx512() : nullptr;
  return has_avx512() && __builtin_cpu_supports("avx512bf16") ? cpu_kernels_avx512_bf16() : nullptr;
#else
  return nullptr;
#endif
}

// Intel's CPUs, which mean the tiles of AMX for bf16, multiply pairs of bf16 at half the rate of fp32 or at the same:
// 90 and 179 GFLOP/s of a core of a Xeon (family 6, model 207), while the products of an EPYC 9004 reach 224 and 116.
// On two cores of the Xeon, in bf16: forward 16.7 ms with them and 12.7 without, forward + backward 56 and 43 (12608
// tokens, d 768, r 64).
bool has_faster_bf16_products() {
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

const CpuKernels* choose_kernels(const AdapterCpuParams& p) {
  int highest = p.instruction_set;
  if (highest == kFastest) highest = adapter_cpu_fastest(p.bf16_products);
  highest = std::min<int>(highest, p.bf16_products ? kAvx512Bf16 : kAvx512);
  for (int set = highest; set >= kPortable; --set) {
    if (const CpuKernels* kernels = kernels_of(static_cast<InstructionSet>(set))) return kernels;
  }
  return nullptr;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// 64-byte aligned parts of one allocation. First every part is taken from address 0, to count.
struct Arena {
  uintptr_t start = 0;
  size_t used = 0;
  template <typename Element>
  Element* take(size_t elements) {
    Element* part = reinterpret_cast<Element*>(start + used);
    used += (elements * sizeof(Element) + 63) / 64 * 64;
    return part;
  }
};

Memory allocate(size_t bytes) {
  return Memory(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))));
}

struct Tile {
  int64_t start;
  int64_t stop;
  int expert;  // index into Plan::experts
  int sums;    // index of the sums it adds to
  int run;
};

// The tokens sorted by expert and cut into tiles.
struct Plan {
  std::vector<int> experts;     // ids
  std::vector<bool> sparse;     // whether what such an expert does not own is left out of products
  std::vector<int64_t> tokens;  // [T], the order in which tiles take them
  std::vector<Tile> tiles;
  std::vector<int> sums_expert;  // which expert (index) each sum belongs to
  int runs = 0;
  int threads = 1;
  int workers = 1;  // of the threads, those that find a tile
};

int64_t expert_of(const AdapterCpuParams& p, int group) { return p.expert != nullptr ? p.expert[group] : p.expert_id; }

// Rows of each tile of `count` tokens: an even number of nearly equal tiles, in sixes as the products work on them.
int64_t tile_rows(int64_t count) {
  const int64_t least = (count + kTileRows - 1) / kTileRows;
  const int64_t parts = least == 1 ? 1 : (least + 1) / 2 * 2;
  return (count + 6 * parts - 1) / (6 * parts) * 6;
}

Plan make_plan(const AdapterCpuParams& p) {
  Plan plan;
  const int64_t length = p.tokens / p.expert_groups;
  std::vector<int> order(static_cast<size_t>(p.expert_groups));
  for (int g = 0; g < p.expert_groups; ++g) order[static_cast<size_t>(g)] = g;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return expert_of(p, a) < expert_of(p, b); });
  plan.tokens.reserve(static_cast<size_t>(p.tokens));
  for (size_t i = 0; i < order.size();) {
    const int64_t expert = expert_of(p, order[i]);
    const int64_t start = static_cast<int64_t>(plan.tokens.size());
    for (; i < order.size() && expert_of(p, order[i]) == expert; ++i) {
      for (int64_t t = 0; t < length; ++t) plan.tokens.push_back(order[i] * length + t);
    }
    const int64_t count = static_cast<int64_t>(plan.tokens.size()) - start;
    const int64_t rows = tile_rows(count);
    for (int64_t from = start; from < start + count; from += rows) {
      plan.tiles.push_back({from, std::min(from + rows, start + count), static_cast<int>(plan.experts.size()), 0, 0});
    }
    plan.experts.push_back(static_cast<int>(expert));
    plan.sparse.push_back(p.assignment != nullptr && expert != kMerged && count >= kSparseTokens);
  }
  const int tiles = static_cast<int>(plan.tiles.size());
  plan.runs = kRuns;
  while (plan.runs < p.threads && plan.runs < kMaxRuns) plan.runs *= 2;
  while (plan.runs > 1 && plan.runs > tiles / 2) plan.runs /= 2;
  for (int i = 0; i < tiles; ++i) {
    Tile& tile = plan.tiles[static_cast<size_t>(i)];
    tile.run = static_cast<int>(static_cast<int64_t>(i) * plan.runs / tiles);
    const bool same = i > 0 && tile.run == plan.tiles[static_cast<size_t>(i - 1)].run &&
                      tile.expert == plan.tiles[static_cast<size_t>(i - 1)].expert;
    if (!same) plan.sums_expert.push_back(tile.expert);
    tile.sums = static_cast<int>(plan.sums_expert.size()) - 1;
  }
  const int64_t products = p.tokens * p.width * p.rank * 2;
  plan.threads = products < kProductsOfOneThread ? 1 : std::max(p.threads, 1);
  plan.workers = std::min(plan.threads, tiles);
  return plan;
}

CpuTile tile_of(const Plan& plan, const Tile& tile, const Tile* next) {
  const int64_t* tokens = plan.tokens.data();
  return {tokens + tile.start, static_cast<int>(tile.stop - tile.start), next ? tokens + next->start : nullptr,
          next ? static_cast<int>(next->stop - next->start) : 0};
}

int check(const AdapterCpuParams& p) {
  if (p.tokens < 0 || p.width < 1 || p.rank < 1 || p.experts < 0 || p.expert_groups < 1 || p.seed_groups < 1) {
    return kNegativeSize;
  }
  if (p.x.data == nullptr || p.w_down.data == nullptr || p.w_up.data == nullptr) {
    return kMissingPointer;
  }
  for (const CpuTensor* t :
       {&p.x, &p.residual, &p.w_down, &p.w_down_init, &p.b_down, &p.w_up, &p.b_up, &p.gamma, &p.beta}) {
    if (t->data != nullptr && t->dtype >= kDTypeCount) return kUnknownDType;
  }
  if (p.x.dtype == kFloat16 || p.activation >= kActivationCount) return kUnknownDType;
  for (int g = 0; g < p.expert_groups; ++g) {
    if (expert_of(p, g) < kMerged || (p.experts > 0 && expert_of(p, g) >= p.experts)) return kUnknownExpert;
  }
  return kOk;
}

CpuTileCall tile_call(const AdapterCpuParams& p) {
  CpuTileCall call = {};
  call.x = p.x.data;
  call.residual = p.residual.data;
  call.seed = p.seed != nullptr ? p.seed : &p.seed_id;
  call.rows_per_seed = std::max<int64_t>(p.tokens / p.seed_groups, 1);
  call.width = p.width;
  call.rank = p.rank;
  call.dropout = p.dropout_p > 0;
  call.scale = p.scale;
  call.alpha = static_cast<float>(p.scale / (1.0 - p.dropout_p));
  call.norm_eps = p.norm_eps;
  call.drop_below = static_cast<uint32_t>(std::min(p.dropout_p * 4294967296.0, 4294967295.0));
  call.activation = p.activation;
  call.half_tokens = p.x.dtype == kBFloat16;
  call.add_input = p.add_input;
  return call;
}

// Whether experts differ in the down projection: else the first one's serves all.
bool own_down(const AdapterCpuParams& p) { return p.assignment_down != nullptr; }

// Makes room for the packed weights of all experts that run, and for the rows of what they add where those are read
// again.
std::vector<CpuExpert> take_experts(const AdapterCpuParams& p, const Plan& plan, const CpuKernels& kernels,
                                    bool backward, bool keep_rows, Arena* arena) {
  const size_t wide = static_cast<size_t>(padded(p.width)), narrow = static_cast<size_t>(padded(p.rank));
  std::vector<CpuExpert> experts(plan.experts.size());
  for (size_t i = 0; i < experts.size(); ++i) {
    CpuExpert& e = experts[i];
    if (i == 0 || own_down(p)) {
      e.b_down = arena->take<float>(narrow);
      e.row_sums = arena->take<float>(narrow);
      e.down = arena->take<char>(kernels.packed_bytes(p.width, p.rank));
      e.down_back = backward ? arena->take<char>(kernels.packed_bytes(p.rank, p.width)) : nullptr;
    } else {
      e = experts[0];
    }
    e.up_rows = keep_rows ? arena->take<float>(static_cast<size_t>(p.width) * narrow) : nullptr;
    e.b_up = arena->take<float>(wide);
    e.up = backward ? nullptr : arena->take<char>(kernels.packed_bytes(p.rank, p.width));
    e.up_back = backward ? arena->take<char>(kernels.packed_bytes(p.width, p.rank)) : nullptr;
    const bool owner = backward && plan.sparse[i] && kernels.owned_bytes != nullptr;
    e.owned_memory = owner ? arena->take<char>(kernels.owned_bytes(p.width, p.rank)) : nullptr;
    e.owned = {};
  }
  return experts;
}

// Makes room for each worker: the scratch of a tile, which holds the rows of an expert's weights while they are packed.
// Of memory for the rows alone every line would come from beyond the second cache.
std::vector<char*> take_scratch(const AdapterCpuParams& p, const Plan& plan, const CpuKernels& kernels, bool backward,
                                Arena* arena) {
  const int64_t rows = std::max(p.rank * padded(p.width), p.width * padded(p.rank));
  const size_t bytes =
      std::max(kernels.scratch_bytes(p.width, p.rank, backward), static_cast<size_t>(rows) * sizeof(float));
  std::vector<char*> scratch(static_cast<size_t>(plan.workers));
  for (char*& part : scratch) part = arena->take<char>(bytes);
  return scratch;
}

void pack_down(const AdapterCpuParams& p, int id, const CpuKernels& kernels, bool backward, const CpuExpert& e,
               float* rows) {
  const int64_t wide = padded(p.width);
  expert_down(p, id, e, rows);
  kernels.pack(rows, wide, p.width, p.rank, true, false, e.down);
  if (backward) kernels.pack(rows, wide, p.rank, p.width, false, false, e.down_back);
}

void pack_up(const AdapterCpuParams& p, int id, bool sparse, const CpuKernels& kernels, bool backward, CpuExpert& e,
             float* rows) {
  const int64_t narrow = padded(p.rank);
  expert_up(p, id, e, rows);
  if (!backward) return kernels.pack(rows, narrow, p.rank, p.width, true, sparse, e.up);
  kernels.pack(rows, narrow, p.width, p.rank, false, sparse, e.up_back);
  if (e.owned_memory != nullptr) kernels.pack_owned({p.assignment, id, p.width, p.rank}, e.owned_memory, &e.owned);
}

void pack_experts(const AdapterCpuParams& p, const Plan& plan, const CpuKernels& kernels, bool backward,
                  const std::vector<char*>& scratch, std::vector<CpuExpert>& experts) {
  const size_t items = experts.size() * 2;
  std::atomic<size_t> next{0};
  parallel_for(plan.workers, plan.threads, [&](int64_t worker) {
    float* rows = reinterpret_cast<float*>(scratch[static_cast<size_t>(worker)]);
    for (size_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) {
      CpuExpert& e = experts[item / 2];
      const int id = plan.experts[item / 2];
      if (item % 2 != 0) {
        pack_up(p, id, plan.sparse[item / 2], kernels, backward, e, e.up_rows != nullptr ? e.up_rows : rows);
      } else if (item == 0 || own_down(p)) {
        pack_down(p, id, kernels, backward, e, rows);
      }
    }
  });
}

std::vector<CpuSums> take_sums(const AdapterCpuParams& p, const Plan& plan, Arena* arena) {
  const size_t wide = static_cast<size_t>(padded(p.width)), narrow = static_cast<size_t>(padded(p.rank));
  std::vector<CpuSums> sums(plan.sums_expert.size());
  for (CpuSums& s : sums) {
    s.up = arena->take<float>(static_cast<size_t>(p.rank) * wide);
    s.down = arena->take<float>(static_cast<size_t>(p.rank) * wide);
    s.b_down = arena->take<float>(narrow);
    s.columns = arena->take<float>(wide);
    s.b_down_excess = arena->take<float>(narrow);
    s.columns_excess = arena->take<float>(wide);
  }
  return sums;
}

}  // namespace

bool adapter_cpu_has(InstructionSet set) { return kernels_of(set) != nullptr; }

InstructionSet adapter_cpu_fastest(bool bf16_products) {
  for (int set = bf16_products && has_faster_bf16_products() ? kAvx512Bf16 : kAvx512; set > kPortable; --set) {
    if (adapter_cpu_has(static_cast<InstructionSet>(set))) return static_cast<InstructionSet>(set);
  }
  return kPortable;
}

int adapter_cpu_forward(const AdapterCpuParams& params, const AdapterCpuOutputs& outputs) {
  if (const int code = check(params); code != kOk) return code;
  const CpuKernels* kernels = choose_kernels(params);
  if (kernels == nullptr) return kNotBuilt;
  if (params.tokens == 0) return kOk;
  const Plan plan = make_plan(params);
  std::vector<CpuExpert> experts;
  std::vector<char*> scratch;
  Memory memory;
  for (const bool counting : {true, false}) {
    Arena arena;
    arena.start = reinterpret_cast<uintptr_t>(memory.get());
    experts = take_experts(params, plan, *kernels, false, false, &arena);
    scratch = take_scratch(params, plan, *kernels, false, &arena);
    if (!counting) break;
    memory = allocate(arena.used);
    if (memory == nullptr) return kOutOfMemory;
  }
  pack_experts(params, plan, *kernels, false, scratch, experts);

  CpuTileCall call = tile_call(params);
  call.out = outputs.out;
  call.mean = outputs.mean;
  call.rstd = outputs.rstd;
  const int64_t tiles = static_cast<int64_t>(plan.tiles.size());
  std::atomic<int64_t> next{0};
  parallel_for(plan.workers, plan.threads, [&](int64_t worker) {
    for (int64_t i = next.fetch_add(1), following = 0; i < tiles; i = following) {
      following = next.fetch_add(1);
      const Tile& tile = plan.tiles[static_cast<size_t>(i)];
      const Tile* after = following < tiles ? &plan.tiles[static_cast<size_t>(following)] : nullptr;
      kernels->forward(call, tile_of(plan, tile, after), experts[static_cast<size_t>(tile.expert)],
                       scratch[static_cast<size_t>(worker)]);
    }
  });
  return kOk;
}

int adapter_cpu_backward(const AdapterCpuParams& params, const AdapterCpuGradients& gradients) {
  if (const int code = check(params); code != kOk) return code;
  const CpuKernels* kernels = choose_kernels(params);
  if (kernels == nullptr) return kNotBuilt;
  if (params.tokens == 0) return kOk;
  const Plan plan = make_plan(params);
  std::vector<CpuExpert> experts;
  std::vector<CpuSums> sums;
  std::vector<char*> scratch;
  Memory memory;
  for (const bool counting : {true, false}) {
    Arena arena;
    arena.start = reinterpret_cast<uintptr_t>(memory.get());
    experts = take_experts(params, plan, *kernels, true, gradients.scale != nullptr, &arena);
    sums = take_sums(params, plan, &arena);
    scratch = take_scratch(params, plan, *kernels, true, &arena);
    if (!counting) break;
    memory = allocate(arena.used);
    if (memory == nullptr) return kOutOfMemory;
  }
  pack_experts(params, plan, *kernels, true, scratch, experts);

  CpuTileCall call = tile_call(params);
  call.grad_out = gradients.grad_out;
  call.out = gradients.x;
  call.mean = const_cast<float*>(gradients.mean);
  call.rstd = const_cast<float*>(gradients.rstd);
  call.weights = wants_sums(gradients);
  std::atomic<int> next{0};
  parallel_for(plan.workers, plan.threads, [&](int64_t worker) {
    for (int run = next.fetch_add(1); run < plan.runs; run = next.fetch_add(1)) {
      int last = -1;
      for (size_t i = 0; i < plan.tiles.size(); ++i) {
        const Tile& tile = plan.tiles[i];
        if (tile.run != run) continue;
        const bool ends = i + 1 == plan.tiles.size() || plan.tiles[i + 1].run != run;
        CpuSums into = sums[static_cast<size_t>(tile.sums)];
        into.fresh = tile.sums != last;
        last = tile.sums;
        kernels->backward(call, tile_of(plan, tile, ends ? nullptr : &plan.tiles[i + 1]),
                          experts[static_cast<size_t>(tile.expert)], into, scratch[static_cast<size_t>(worker)]);
      }
    }
  });
  if (!call.weights) return kOk;
  finish_gradients(params, gradients, *kernels, plan.experts, experts, plan.sums_expert, sums, plan.threads);
  return kOk;
}

}  // namespace mosa
