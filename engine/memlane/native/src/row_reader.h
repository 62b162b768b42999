// Rows from a file into slots: merged, aligned, many reads in flight, in the background; every failure by row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "read_queue.h"

namespace memlane {

class RowReader {
 public:
  static constexpr auto kForEver = ReadQueue::Clock::time_point::max();

  struct Options {
    std::string path;
    ReadQueue::Options queue;
    bool allow_uring = true;
    bool allow_direct = true;
    bool fixed_buffers = true;  // known to the kernel once and for all, where it lets us
    unsigned depth = 256;  // reads in flight
  };

  // Opens the file and chooses how to read by trying. Throws std::system_error (cannot open) or
  // std::invalid_argument (the file is too short for its rows, or there are too few checksums).
  explicit RowReader(const Options& options);
  ~RowReader();
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  // In a process that was forked from the one that opened it, all of these throw std::runtime_error: the ring and its
  // buffers are the parent's.
  // Begins to read rows[i] (ascending, unique, in range) to slots[i] of `out`, and returns. Requests are begun in the
  // order of these calls; rows end in any order, each setting the state of its slot.
  std::shared_ptr<ReadRequest> start(std::vector<std::int64_t> rows, std::vector<std::int32_t> slots, const Arena& out,
                                     const SlotStates& states, bool background = false);
  // Returns when more rows are settled than `seen`, or all are, or `until` has come. It is what makes the reads of a
  // small request end.
  void wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until = kForEver) {
    require_own_process();
    driver_->wait(request, seen, until);
  }
  // Waits for all; the rows that failed, by ascending position. Their slots hold nothing of use.
  std::vector<ReadFailure> finish(ReadRequest& request);
  void drain();  // waits until nothing is under way, whoever started it

  const std::string& backend() const { return backend_; }  // "io_uring+direct", "threads+buffered", ...
  const std::string& reason() const { return reason_; }    // why not something faster; empty if nothing is
  bool direct() const { return direct_; }
  std::size_t buffer_bytes() const { return driver_->buffer_bytes(); }
  ReadQueue& queue() { return *queue_; }
  const ReadQueue& queue() const { return *queue_; }
  // Bytes of the file that the system's page cache holds now; -1 where it cannot be asked.
  std::int64_t page_cache_bytes() const;

 private:
  void open_file(const Options& options);
  void check_size(const Options& options) const;
  std::string choose_driver(const Options& options);
  std::string try_reading();
  void require_own_process() const;

  std::shared_ptr<ReadQueue> queue_;
  int file_ = -1;
  int process_;
  bool direct_ = false;
  std::unique_ptr<ReadDriver> driver_;
  std::string backend_;
  std::string reason_;
};

}  // namespace memlane
