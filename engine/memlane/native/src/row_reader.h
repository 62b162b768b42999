// Rows from a file into slots: merged, aligned, many reads in flight, every failure reported by row.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arena.h"
#include "thread_pool.h"
#include "uring.h"

namespace memlane {

// One read: whole pages that hold rows [first, first + count) of the batch, perhaps with unwanted bytes between.
//
//    file    |....page....|....page....|....page....|
//    rows       [ r ]          [r+1][r+2]                 r+1 straddles nothing, r+2 ends in the third page:
//    extents |<--------->|<------------------------>|    neighbouring pages join into one read
struct Extent {
  std::uint64_t offset;  // page-aligned
  std::uint32_t length;  // whole pages, at most the bounce buffer
  std::uint32_t needed;  // up to the end of the last row: what the file must at least give
  std::uint32_t first;
  std::uint32_t count;
};

class RowReader {
 public:
  struct Options {
    std::string path;
    std::uint64_t offset = 0;  // of row 0 in the file
    std::size_t stride = 0;
    std::size_t rows = 0;
    bool allow_uring = true;
    bool allow_direct = true;
    unsigned depth = 128;            // reads in flight
    std::size_t merge_gap = 4096;    // unwanted bytes read rather than starting another read
  };

  struct Failure {
    std::int64_t position;  // among the rows asked for
    int error;              // errno, 0 = the file ended before the row
  };

  // Opens the file and chooses how to read by trying. Throws std::system_error (cannot open) or
  // std::invalid_argument (the file is too short for its rows).
  explicit RowReader(const Options& options);
  ~RowReader();
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  // Reads rows[i] (ascending, unique, in range) to out + slots[i] * stride. Blocks. One caller at a time.
  // Returns the rows that failed, by ascending position; their slots hold nothing of use.
  std::vector<Failure> read(const std::int64_t* rows, const std::int32_t* slots, std::size_t count, std::uint8_t* out);

  const std::string& backend() const { return backend_; }  // "io_uring+direct", "threads+buffered", ...
  const std::string& reason() const { return reason_; }    // why not something faster; empty if nothing is
  std::size_t rows() const { return options_.rows; }
  std::size_t stride() const { return options_.stride; }
  std::size_t scratch_bytes() const { return bounce_->size(); }
  std::uint64_t bytes_read() const { return bytes_read_; }
  std::uint64_t reads() const { return reads_; }
  std::uint64_t retries() const { return retries_; }
  std::int64_t in_flight() const { return in_flight_; }

  // Tests: the next `times` reads that touch rows [first, last] fail with `error`, or, where error is 0, end
  // just before row `first` (times < 0: for ever). Cleared by times = 0.
  void inject_fault(std::int64_t first, std::int64_t last, int error, int times);

 private:
  struct Batch;
  struct Operation {
    Extent extent;
    std::uint32_t done = 0;     // bytes already in the buffer, a multiple of a page
    std::uint32_t reached = 0;  // the furthest byte a read has given
    int attempts = 0;           // reads that got no further
  };
  enum class Outcome { complete, again, failed };

  std::vector<Extent> plan(const std::int64_t* rows, std::size_t count) const;
  Extent extent_of(const std::int64_t* rows, std::uint32_t position) const;
  Outcome account(Operation& operation, std::int64_t result, int& error);
  std::int64_t with_fault(const Operation& operation, std::int64_t result);
  void deliver(const Extent& extent, const std::uint8_t* buffer, const Batch& batch);
  void read_by_uring(Batch& batch);
  void read_by_threads(Batch& batch);
  bool read_blocking(const Extent& extent, std::uint8_t* buffer, const Batch& batch, int& error);
  std::string try_reading(bool uring);

  Options options_;
  int file_ = -1;
  bool direct_ = false;
  bool broken_ = false;  // the ring failed with reads in flight: its buffers may still be written to
  std::size_t buffer_bytes_ = 0;
  unsigned buffers_ = 0;
  std::unique_ptr<Arena> bounce_;
  std::unique_ptr<Uring> uring_;
  std::unique_ptr<ThreadPool> threads_;
  std::string backend_;
  std::string reason_;
  std::atomic<std::uint64_t> bytes_read_{0};
  std::atomic<std::uint64_t> reads_{0};
  std::atomic<std::uint64_t> retries_{0};
  std::atomic<std::int64_t> in_flight_{0};

  struct Fault {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    int error = 0;
    int times = 0;
  };
  std::mutex fault_mutex_;
  Fault fault_;
  std::atomic<bool> has_fault_{false};
};

}  // namespace memlane
