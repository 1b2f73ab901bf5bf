// Whether every two accesses to the same byte of shared or global memory, one of them a write, are in an order that
// the program gives them, whatever order the fibers happen to run in.
//
// With CUDA_ON_HOST_RACES kernels are compiled with GCC's -fsanitize=thread, which calls a function at every access;
// those functions are in races.cpp, in place of the sanitizer's runtime. Order comes from __syncthreads, from
// __syncwarp within a warp, from the barrier of a cluster, and from an atomic operation between two fences; shuffles
// and products of matrices give none. The bytes that an asynchronous copy will write are nobody's until it is waited
// for. And whether what is read was ever written: memory that tests have poisoned (tests/helpers/poison.py) was not.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_host::races {

#ifdef CUDA_ON_HOST_RACES

constexpr uint32_t kPoison = CUDA_ON_HOST_POISON;  // of tests/helpers/poison.py

inline bool watching = false;  // the code that runs is a kernel's
[[gnu::no_sanitize("thread")]] inline void watch(bool whether) { watching = whether; }

// While the code of this stand-in runs.
struct Unwatched {
  const bool before;
  [[gnu::no_sanitize("thread")]] Unwatched() : before(watching) { watching = false; }
  [[gnu::no_sanitize("thread")]] ~Unwatched() { watching = before; }
};

void begin_launch();
void read(const void* from, size_t size);
void begin_copy(void* to, const void* from, size_t size, size_t taken);
void end_copy(void* to, size_t size);
void fence();
void atomic();
const char* found();  // a description of the first race of this launch, or read of what nobody has written, or null

#else

struct Unwatched {
  Unwatched() {}
};
inline void watch(bool) {}
inline void begin_launch() {}
inline void read(const void*, size_t) {}
inline void begin_copy(void*, const void*, size_t, size_t) {}
inline void end_copy(void*, size_t) {}
inline void fence() {}
inline void atomic() {}
inline const char* found() { return nullptr; }

#endif

}  // namespace cuda_on_host::races
