// Reads by threads that block, for systems without io_uring.
#pragma once

#include <memory>
#include <vector>

#include "buffers.h"
#include "read_queue.h"

namespace memlane {

class ThreadDriver final : public ReadDriver {
 public:
  // `file` is a descriptor of its own, closed when the last thread has ended: one that hangs in a read may outlive us.
  ThreadDriver(std::shared_ptr<ReadQueue> queue, int file, unsigned threads, std::size_t buffer_bytes);
  ~ThreadDriver() override;

  const char* name() const override { return "threads"; }
  void started() override { queue_->changed.notify_all(); }
  void wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until) override;
  std::size_t buffer_bytes() const override;

 private:
  struct Crew;
  static void work(const std::shared_ptr<Crew>& crew, std::size_t place);

  std::shared_ptr<ReadQueue> queue_;
  std::shared_ptr<Crew> crew_;
};

}  // namespace memlane
