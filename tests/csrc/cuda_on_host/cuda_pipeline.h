// Asynchronous copies that happen as late as the program allows: when the thread that started them waits for them.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  if (reinterpret_cast<uintptr_t>(to) % size != 0 || (zeros < size && reinterpret_cast<uintptr_t>(from) % size != 0)) {
    std::fprintf(stderr, "an asynchronous copy of %zu bytes between addresses that are no multiples\n", size);
    std::abort();
  }
  cuda_on_host::races::begin_copy(to, from, size, size - zeros);
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::self().copies.back().push_back({to, from, size, zeros});
}

inline void __pipeline_commit() {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::self().copies.emplace_back();
}

inline void __pipeline_wait_prior(size_t left) {
  const cuda_on_host::races::Unwatched unwatched;
  auto& copies = cuda_on_host::self().copies;
  const size_t committed = copies.size() - 1;
  const size_t finished = committed > left ? committed - left : 0;
  for (size_t group = 0; group < finished; ++group) {
    for (const cuda_on_host::Copy& copy : copies[group]) {
      const size_t taken = copy.size - copy.zeros;
      if (taken > 0) std::memcpy(copy.to, copy.from, taken);
      std::memset(static_cast<char*>(copy.to) + taken, 0, copy.zeros);
      cuda_on_host::races::end_copy(copy.to, copy.size);
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(finished));
}
