#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <memory>

namespace memlane {

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_parts(std::unique_lock<std::mutex>& lock) {
  while (next_ < parts_) {
    const int part = next_++;
    ++running_;
    const auto* body = body_;
    lock.unlock();
    (*body)(part);
    lock.lock();
    --running_;
  }
  if (running_ == 0) done_.notify_all();
}

void ThreadPool::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stop_ || next_ < parts_; });
    if (stop_) return;
    run_parts(lock);
  }
}

void ThreadPool::parallel_for(int parts, const std::function<void(int)>& body) {
  if (parts <= 0) return;
  if (parts == 1 || workers_.empty()) {
    for (int part = 0; part < parts; ++part) body(part);
    return;
  }
  std::lock_guard call(call_mutex_);
  std::unique_lock lock(mutex_);
  body_ = &body;
  next_ = 0;
  parts_ = parts;
  for (int i = 1; i < std::min(parts, threads()); ++i) wake_.notify_one();
  run_parts(lock);
  done_.wait(lock, [this] { return running_ == 0 && next_ >= parts_; });
  parts_ = 0;
  next_ = 0;
  body_ = nullptr;
}

namespace {

std::mutex pool_mutex;
std::shared_ptr<ThreadPool> pool;
int wanted_threads = 0;

int default_threads() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return 1;
  return std::clamp(CPU_COUNT(&allowed), 1, 8);
}

std::shared_ptr<ThreadPool> shared_pool() {
  std::lock_guard lock(pool_mutex);
  if (!pool) {
    // Threads do not survive fork(): a child must start its own. The parent's pool object is leaked there, since
    // joining threads that do not exist would hang.
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      if (pool) new std::shared_ptr<ThreadPool>(pool);
      pool.reset();
    });
    (void)registered;
    if (wanted_threads == 0) wanted_threads = default_threads();
    pool = std::make_shared<ThreadPool>(wanted_threads);
  }
  return pool;
}

}  // namespace

void set_threads(int threads) {
  std::shared_ptr<ThreadPool> old;  // joined outside the lock
  std::lock_guard lock(pool_mutex);
  wanted_threads = std::max(1, threads);
  old.swap(pool);
}

int get_threads() {
  std::lock_guard lock(pool_mutex);
  if (wanted_threads == 0) wanted_threads = default_threads();
  return wanted_threads;
}

void parallel_ranges(std::size_t count, std::size_t min_count,
                     const std::function<void(std::size_t, std::size_t)>& body) {
  const std::size_t most = count / std::max<std::size_t>(1, min_count);
  const auto parts = static_cast<int>(std::min<std::size_t>(most, static_cast<std::size_t>(get_threads())));
  if (parts <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  shared_pool()->parallel_for(parts, [&](int part) {
    const auto begin = count * static_cast<std::size_t>(part) / static_cast<std::size_t>(parts);
    const auto end = count * (static_cast<std::size_t>(part) + 1) / static_cast<std::size_t>(parts);
    body(begin, end);
  });
}

}  // namespace memlane
