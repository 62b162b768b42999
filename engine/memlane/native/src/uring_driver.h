// Reads through io_uring: the thread that waits for rows drives the ring itself, so that a short wait costs no change
// of threads; a thread in the background drives it only while more is to be read than is in flight at once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "buffers.h"
#include "read_queue.h"
#include "uring.h"

namespace memlane {

class UringDriver final : public ReadDriver {
 public:
  struct Options {
    int file;
    unsigned depth;        // reads in flight
    std::size_t buffers;   // bytes for all of them together
    bool fixed_buffers;    // registered with the kernel, if it lets us
  };

  // Null, with the reason in words, where io_uring cannot be had.
  static std::unique_ptr<UringDriver> make(std::shared_ptr<ReadQueue> queue, const Options& options,
                                           std::string& reason);
  ~UringDriver() override;

  const char* name() const override { return "io_uring"; }
  void started() override;
  void wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until) override;
  std::size_t buffer_bytes() const override { return buffers_->size(); }

 private:
  UringDriver(std::shared_ptr<ReadQueue> queue, const Options& options);
  void drive(std::unique_lock<std::mutex>& lock, std::chrono::nanoseconds patience);
  void fill();
  void submit();
  void queue_read(std::uint32_t place);
  bool reap();
  void release(std::uint32_t place);
  void look_after_late_ones();
  void run_in_background();

  std::shared_ptr<ReadQueue> queue_;  // its mutex guards all that follows, but for waiting in the kernel
  Options options_;
  Uring ring_;
  std::unique_ptr<Buffers> buffers_;
  std::vector<ReadOperation> operations_;
  std::vector<std::uint32_t> idle_;
  unsigned in_kernel_ = 0;   // operations whose buffers the kernel may write to
  bool driving_ = false;     // some thread waits in the kernel for all
  int broken_ = 0;           // errno of a ring that failed: it is not used any more
  std::chrono::steady_clock::time_point looked_{};
  std::condition_variable backlog_;
  std::thread background_;
};

}  // namespace memlane
