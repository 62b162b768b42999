// A few threads that sleep until there is work. No spinning: on a shared machine a spinning barrier collapses.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace memlane {

// parallel_for may be called from several threads; the calls run one after another. The caller works too, so a
// pool of n threads holds n-1 workers.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(part) for part in [0, parts), each part once, and returns when all are done. body must not throw.
  void parallel_for(int parts, const std::function<void(int)>& body);

 private:
  void work();
  void run_parts(std::unique_lock<std::mutex>& lock);

  std::vector<std::thread> workers_;
  std::mutex call_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(int)>* body_ = nullptr;
  int next_ = 0;
  int parts_ = 0;
  int running_ = 0;
  bool stop_ = false;
};

// The pool the kernels share. Sized on first use: set_threads(n), else the CPUs this process may run on, at most 8.
void set_threads(int threads);
int get_threads();

// Splits [0, count) into at most get_threads() ranges of at least min_count and calls body(begin, end) for each.
void parallel_ranges(std::size_t count, std::size_t min_count, const std::function<void(std::size_t, std::size_t)>& body);

}  // namespace memlane
