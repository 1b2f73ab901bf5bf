#include "parallel.h"

#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace mosa {
namespace {

using Team = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

// The entry of the OpenMP runtime that PyTorch brought into the process; null without one.
//
// Its threads spin for a while after each operator of PyTorch, in wait for the next, and threads of our own would share
// the cores with them: forward + backward (d 768, r 64, bf16, 2 cores) took 34.4 ms on plain threads and 31.4 ms on
// these for 64 x 197 tokens, 2.12 ms and 1.11 ms for 197. Looked up by name, so that the binary needs no OpenMP. A
// forked process has the runtime's memory but not its threads, and starts plain ones.
Team openmp_team() {
#if defined(__unix__) || defined(__APPLE__)
  static std::atomic<bool> forked{false};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  if (registered != 0 || forked.load()) return nullptr;
  return reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

// On a busy machine a new thread may have to wait for milliseconds before it runs. Where all work is done by then,
// nobody waits for it: it finds the gate closed and touches nothing but the gate.
void run_on_plain_threads(int threads, void (*work)(void*), void* data) {
  struct Gate {
    std::mutex mutex;
    std::condition_variable left;
    int inside = 0;
    bool closed = false;
  };
  const auto gate = std::make_shared<Gate>();
  try {
    for (int helper = 1; helper < threads; ++helper) {
      std::thread([gate, work, data] {
        {
          const std::lock_guard<std::mutex> lock(gate->mutex);
          if (gate->closed) return;
          ++gate->inside;
        }
        work(data);
        const std::lock_guard<std::mutex> lock(gate->mutex);
        if (--gate->inside == 0) gate->left.notify_one();
      }).detach();
    }
  } catch (const std::exception&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  work(data);
  std::unique_lock<std::mutex> lock(gate->mutex);
  gate->closed = true;
  gate->left.wait(lock, [&] { return gate->inside == 0; });
}

}  // namespace

void run_together(int threads, void (*work)(void*), void* data) {
  if (const Team team = openmp_team()) return team(work, data, static_cast<unsigned>(threads), 0);
  run_on_plain_threads(threads, work, data);
}

}  // namespace mosa
