// A parallel loop on plain threads, for work too rare to keep a pool alive.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace mosa {

// Calls body(item) for every item in [0, items) on up to `threads` threads, this one included. The body must not throw.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(item);
  };
  std::vector<std::thread> helpers;
  try {
    const int64_t wanted = std::min<int64_t>(threads, items) - 1;
    helpers.reserve(static_cast<size_t>(std::max<int64_t>(wanted, 0)));
    for (int64_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace mosa
