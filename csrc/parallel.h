// A parallel loop on plain threads, for work too rare to keep a pool alive.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace mosa {

// Calls body(item) for every item in [0, items) on up to `threads` threads, this one included. The body must not throw.
//
// On a busy machine a new thread may have to wait for milliseconds before it runs. Where all items are done by then,
// nobody waits for it: it finds the gate closed and touches nothing but the gate.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  struct Gate {
    std::mutex mutex;
    std::condition_variable left;
    int inside = 0;
    bool closed = false;
  };
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) body(item);
  };
  if (threads <= 1 || items <= 1) return work();

  const auto gate = std::make_shared<Gate>();
  try {
    for (int64_t helper = 1; helper < threads && helper < items; ++helper) {
      std::thread([gate, &work] {
        {
          const std::lock_guard<std::mutex> lock(gate->mutex);
          if (gate->closed) return;
          ++gate->inside;
        }
        work();
        const std::lock_guard<std::mutex> lock(gate->mutex);
        if (--gate->inside == 0) gate->left.notify_one();
      }).detach();
    }
  } catch (const std::exception&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  work();
  std::unique_lock<std::mutex> lock(gate->mutex);
  gate->closed = true;
  gate->left.wait(lock, [&] { return gate->inside == 0; });
}

}  // namespace mosa
