// What -fsanitize=thread calls at every access of a kernel on the host: see races.h. Compiled without that option.

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#include <unordered_map>

#include "cuda_runtime.h"

namespace cuda_on_host::races {
namespace {

// How far a thread had come when it touched a byte.
struct Access {
  uint64_t launch = 0;  // 0: nobody has
  uint64_t group = 0;   // the cluster, or the block where there is none
  size_t rank = 0;      // of the block in its cluster
  size_t thread = 0;
  long block_barriers = 0;
  long warp_orders = 0;
  long cluster_arrivals = 0;
  uintptr_t where = 0;
  uint3 index;  // of the block
};

struct Byte {
  Access write;
  Access read;                // the last of those since that write
  bool many_threads = false;  // have read since, in no order
  bool many_warps = false;
  bool many_blocks = false;
  bool copied = false;  // an asynchronous copy that nobody has waited for will write it
};

constexpr size_t kPage = 256;
struct Page {
  Byte bytes[kPage];
};

// The atomic operations of a block, by which blocks tell each other how far they are.
struct Announcement {
  uint64_t order = 0;  // among those of the launch; 0: none
  size_t thread = 0;
  long block_barriers = 0;
};
struct Announcements {
  Announcement fenced;       // behind a fence: others may see what was done before
  Announcement heard;        // seen what others announced
  bool fence_after = false;  // a fence came after that
};

uint64_t launch = 0;      // their number
uint64_t operations = 0;  // atomic ones of this launch
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::unordered_map<uint64_t, Announcements> announcements;  // of each block without a cluster
std::string complaint;                                      // the first of this launch

Byte& byte_at(uintptr_t address) {
  std::unique_ptr<Page>& page = pages[address / kPage];
  if (page == nullptr) page = std::make_unique<Page>();
  return page->bytes[address % kPage];
}

// The variables of this module that each thread of the host has for itself: shared memory.
bool is_shared(uintptr_t address) {
  static thread_local uintptr_t begin = 0, end = 0;
  if (end == 0) {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void*) {
          const auto here = reinterpret_cast<uintptr_t>(&is_shared);
          bool own = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& part = info->dlpi_phdr[i];
            const uintptr_t from = info->dlpi_addr + part.p_vaddr;
            if (part.p_type == PT_LOAD && here >= from && here < from + part.p_memsz) own = true;
          }
          for (int i = 0; own && i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
            begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
            end = begin + info->dlpi_phdr[i].p_memsz;
          }
          return 0;
        },
        nullptr);
  }
  if (address >= begin && address < end) return true;
  if (block->cluster == nullptr) return false;
  for (const unsigned char* shared : block->cluster->shared) {
    const auto from = reinterpret_cast<uintptr_t>(shared);
    if (address >= from && address < from + kSharedInClusters) return true;
  }
  return false;
}

Access access_now(uintptr_t where) {
  const Fiber& fiber = self();
  Access now;
  now.launch = launch;
  now.group = block->group;
  now.rank = block->cluster == nullptr ? 0 : rank_of_block();
  now.thread = block->current;
  now.block_barriers = fiber.block_barriers;
  now.warp_orders = fiber.warp_orders;
  now.cluster_arrivals = fiber.cluster_arrivals;
  now.where = where;
  now.index = block->index;
  return now;
}

bool heard_of(const Access& before, const Access& now) {
  const auto from = announcements.find(before.group), to = announcements.find(now.group);
  if (from == announcements.end() || to == announcements.end()) return false;
  const Announcement &said = from->second.fenced, &heard = to->second.heard;
  return said.order > 0 && said.order < heard.order && to->second.fence_after &&
         (before.block_barriers < said.block_barriers || before.thread == said.thread) &&
         (now.block_barriers > heard.block_barriers || now.thread == heard.thread);
}

bool is_ordered(const Access& before, const Access& now, uintptr_t address) {
  if (before.launch != now.launch) return true;
  if (before.group != now.group) return is_shared(address) || heard_of(before, now);
  if (before.rank == now.rank) {
    if (before.thread == now.thread || now.block_barriers > before.block_barriers) return true;
    if (before.thread / kWarpSize == now.thread / kWarpSize && now.warp_orders > before.warp_orders) return true;
  }
  return self().cluster_waits > before.cluster_arrivals;
}

// Whether all that have read are in order with a write now: the last of them, and any other thread where there are
// more.
bool are_reads_ordered(const Byte& byte, const Access& now, uintptr_t address) {
  Access reader = byte.read;
  const bool own_block = reader.group == now.group && reader.rank == now.rank;
  if (byte.many_blocks && reader.launch == now.launch && !is_shared(address)) return false;
  if (byte.many_warps && own_block) {
    reader.thread = now.thread + kWarpSize;
  } else if (byte.many_threads && own_block && reader.thread == now.thread) {
    reader.thread ^= 1;
  }
  return is_ordered(reader, now, address);
}

std::string place_of(uintptr_t where) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(where), &info) == 0) return "?";
  char command[1024], line[512] = "";
  const auto offset = where - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  std::snprintf(command, sizeof(command), "addr2line -s -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long>(offset));
  if (FILE* answer = popen(command, "r")) {
    if (std::fgets(line, sizeof(line), answer) == nullptr) line[0] = '\0';
    pclose(answer);
  }
  const std::string text(line);
  return text.empty() ? "?" : text.substr(0, text.find_first_of(" \n"));
}

std::string describe(const char* what, const Access& access) {
  return std::string(what) + " by thread " + std::to_string(access.thread) + " of block (" +
         std::to_string(access.index.x) + ", " + std::to_string(access.index.y) + ") at " + place_of(access.where);
}

void report(uintptr_t address, const std::string& before, const std::string& now) {
  complaint = std::string("a data race in ") + (is_shared(address) ? "shared" : "global") + " memory: " + now +
              ", and " + before + ", in no order";
}

// A number of 16 bits, or any two of them or number of 32 bits that lie together.
bool is_poison(uintptr_t address, size_t size) {
  uint32_t word = 0;
  const size_t step = std::min(size, sizeof(word));
  if (step < 2) return false;
  const uint32_t poison = step == 2 ? kPoison & 0xffffu : kPoison;
  for (size_t at = 0; at + step <= size; at += step) {
    std::memcpy(&word, reinterpret_cast<const void*>(address + at), step);
    if (word == poison) return true;
  }
  return false;
}

void touch(uintptr_t address, size_t size, bool writes, uintptr_t where) {
  const auto stack = reinterpret_cast<uintptr_t>(self().stack);
  if (address >= stack && address < stack + kStackBytes) return;
  const Access now = access_now(where);
  if (!writes && complaint.empty() && is_poison(address, size)) {
    complaint = describe("a read of memory that nobody has written", now);
  }
  const char* what = writes ? "a write" : "a read";
  for (uintptr_t at = address; at < address + size && complaint.empty(); ++at) {
    Byte& byte = byte_at(at);
    if (byte.copied) {
      report(at, "an asynchronous copy that nobody has waited for", describe(what, now));
    } else if (!is_ordered(byte.write, now, at)) {
      report(at, describe("a write", byte.write), describe(what, now));
    } else if (writes && !are_reads_ordered(byte, now, at)) {
      report(at, describe("a read", byte.read), describe(what, now));
    }
    if (writes) {
      byte.write = now;
      byte.read = Access();
      byte.many_threads = byte.many_warps = byte.many_blocks = false;
      continue;
    }
    const Access& before = byte.read;
    const bool same_block = before.group == now.group && before.rank == now.rank;
    const bool no_further = same_block && before.thread == now.thread && before.block_barriers == now.block_barriers &&
                            before.warp_orders == now.warp_orders && before.cluster_arrivals == now.cluster_arrivals;
    if (!is_ordered(before, now, at)) {
      byte.many_threads = true;
      byte.many_blocks = byte.many_blocks || !same_block;
      byte.many_warps = byte.many_warps || !same_block || before.thread / kWarpSize != now.thread / kWarpSize;
    } else if (!no_further && (!byte.many_warps || !same_block || now.block_barriers > before.block_barriers ||
                               self().cluster_waits > before.cluster_arrivals)) {
      byte.many_threads = byte.many_warps = byte.many_blocks = false;
    }
    byte.read = now;
  }
}

}  // namespace

void begin_launch() {
  ++launch;
  operations = 0;
  pages.clear();
  announcements.clear();
  complaint.clear();
}

void read(const void* from, size_t size) {
  if (watching)
    touch(reinterpret_cast<uintptr_t>(from), size, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void begin_copy(void* to, const void* from, size_t size, size_t taken) {
  const auto where = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  touch(reinterpret_cast<uintptr_t>(from), taken, false, where);
  touch(reinterpret_cast<uintptr_t>(to), size, true, where);
  for (size_t i = 0; i < size; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i).copied = true;
}

void end_copy(void* to, size_t size) {
  for (size_t i = 0; i < size; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i).copied = false;
  touch(reinterpret_cast<uintptr_t>(to), size, true, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void fence() {
  self().fenced = true;
  announcements[block->group].fence_after = true;
}

void atomic() {
  Announcements& own = announcements[block->group];
  const Announcement now = {++operations, block->current, self().block_barriers};
  if (self().fenced) own.fenced = now;
  self().fenced = false;
  own.heard = now;
  own.fence_after = false;
}

const char* found() { return complaint.empty() ? nullptr : complaint.c_str(); }

}  // namespace cuda_on_host::races

using cuda_on_host::races::touch;

#define MOSA_WATCHED(name, size, writes)                             \
  extern "C" void __tsan_##name(void* address) {                     \
    if (!cuda_on_host::races::watching) return;                      \
    touch(reinterpret_cast<uintptr_t>(address), size, writes,        \
          reinterpret_cast<uintptr_t>(__builtin_return_address(0))); \
  }
#define MOSA_WATCHED_BOTH(size)         \
  MOSA_WATCHED(read##size, size, false) \
  MOSA_WATCHED(write##size, size, true)
#define MOSA_WATCHED_UNALIGNED(size)              \
  MOSA_WATCHED_BOTH(size)                         \
  MOSA_WATCHED(unaligned_read##size, size, false) \
  MOSA_WATCHED(unaligned_write##size, size, true)
MOSA_WATCHED_BOTH(1)
MOSA_WATCHED_UNALIGNED(2)
MOSA_WATCHED_UNALIGNED(4)
MOSA_WATCHED_UNALIGNED(8)
MOSA_WATCHED_UNALIGNED(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t size) {
  if (cuda_on_host::races::watching) {
    touch(reinterpret_cast<uintptr_t>(address), size, false, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}
void __tsan_write_range(void* address, size_t size) {
  if (cuda_on_host::races::watching) {
    touch(reinterpret_cast<uintptr_t>(address), size, true, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
}
// Atomic operations of the code that launches.
uint8_t __tsan_atomic8_load(const volatile uint8_t* from, int) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
uint32_t __tsan_atomic32_load(const volatile uint32_t* from, int) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile uint32_t* to, uint32_t value, int) {
  __atomic_store_n(to, value, __ATOMIC_SEQ_CST);
}
}
