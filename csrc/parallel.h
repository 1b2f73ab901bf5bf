// A parallel loop on the threads that PyTorch has running already, or on plain ones.
#pragma once

#include <atomic>
#include <cstdint>

namespace mosa {

// Calls work(data) on up to `threads` threads at once, this one included, and waits for those that began. `work` must
// be fit to be called any number of times from one on, and must not throw.
void run_together(int threads, void (*work)(void*), void* data);

// Calls body(item) for every item in [0, items) on up to `threads` threads, this one included. The body must not throw.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(item);
  };
  if (threads <= 1 || items <= 1) return work();
  using Work = decltype(work);
  run_together(
      threads, [](void* data) { (*static_cast<const Work*>(data))(); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace mosa
