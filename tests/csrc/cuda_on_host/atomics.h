// Atomic operations for kernels that run on the host. Fibers change only at barriers, so plain ones are atomic.
#pragma once

#include <algorithm>

#include "cuda_runtime.h"

inline void __threadfence() {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::races::fence();
}

template <typename T>
T atomicAdd(T* address, T value) {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::races::atomic();
  const T old = *address;
  *address = old + value;
  return old;
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::races::atomic();
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const cuda_on_host::races::Unwatched unwatched;
  cuda_on_host::races::atomic();
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
