#include "thread_driver.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>

namespace memlane {

namespace {
constexpr std::chrono::milliseconds kTick{20};
}

// What the threads share. Guarded by the queue's mutex.
struct ThreadDriver::Crew {
  std::shared_ptr<ReadQueue> queue;
  int file;
  Arena buffers;
  std::size_t buffer_bytes;
  std::vector<ReadOperation> operations;  // one a thread
  std::vector<bool> reading;
  std::size_t alive = 0;

  ~Crew() { close(file); }
};

ThreadDriver::ThreadDriver(std::shared_ptr<ReadQueue> queue, int file, unsigned threads, std::size_t buffer_bytes)
    : queue_(queue), crew_(new Crew{std::move(queue), file, Arena(threads * buffer_bytes), buffer_bytes, {}, {}, 0}) {
  crew_->operations.resize(threads);
  crew_->reading.resize(threads);
  try {
    for (std::size_t place = 0; place < threads; ++place) {
      std::thread([crew = crew_, place] { work(crew, place); }).detach();
      ++crew_->alive;
    }
  } catch (const std::system_error&) {
    if (crew_->alive == 0) throw;  // with fewer threads it is only slower
  }
}

// Threads that are still in a read are left to themselves: they hold what they need and end when their read does.
ThreadDriver::~ThreadDriver() {
  std::unique_lock lock(queue_->mutex);
  queue_->stop = true;
  queue_->changed.notify_all();
  for (ReadOperation& operation : crew_->operations) queue_->abandon(operation, ECANCELED);
  const auto stuck = [this] {
    std::size_t count = 0;
    for (std::size_t i = 0; i < crew_->operations.size(); ++i)
      count += crew_->reading[i] && crew_->operations[i].request == nullptr ? 1 : 0;
    return count;
  };
  while (crew_->alive > stuck()) queue_->changed.wait_for(lock, kTick);
}

std::size_t ThreadDriver::buffer_bytes() const { return crew_->buffers.size(); }

void ThreadDriver::wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until) {
  std::unique_lock lock(queue_->mutex);
  while (!request.done() && request.settled <= seen) {
    auto now = ReadQueue::Clock::now();
    const bool over = now >= until;
    if (!over) queue_->changed.wait_for(lock, std::min<std::chrono::nanoseconds>(until - now, kTick));
    now = ReadQueue::Clock::now();
    // Also for a caller without patience: it may be the only one that ever asks.
    for (ReadOperation& operation : crew_->operations)
      if (queue_->late(operation, now)) queue_->abandon(operation, ETIMEDOUT);
    queue_->expire_backlog(now);
    if (over) return;
  }
}

void ThreadDriver::work(const std::shared_ptr<Crew>& crew, std::size_t place) {
  ReadQueue& queue = *crew->queue;
  ReadOperation& operation = crew->operations[place];
  std::uint8_t* const buffer = crew->buffers.data() + place * crew->buffer_bytes;
  std::unique_lock lock(queue.mutex);
  while (true) {
    queue.changed.wait(lock, [&] { return queue.stop || queue.has_backlog(); });
    if (queue.stop) break;
    queue.take(operation);
    operation.buffer = buffer;
    crew->reading[place] = true;
    do {
      while (queue.still_hangs(operation) && !queue.stop) queue.changed.wait_for(lock, kTick);
      const Extent extent = operation.extent;
      const std::uint32_t done = operation.done;
      lock.unlock();
      const ssize_t result =
          pread(crew->file, buffer + done, extent.length - done, static_cast<off_t>(extent.offset + done));
      const std::int64_t outcome = result < 0 ? -errno : result;
      lock.lock();
      if (queue.settle(operation, outcome) == ReadQueue::Outcome::settled) break;
    } while (true);
    crew->reading[place] = false;
  }
  --crew->alive;
  queue.changed.notify_all();
}

}  // namespace memlane
