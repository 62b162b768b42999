// Reads that have been asked for and not yet been done, and what happens to each when it ends. Knows the file's
// layout and checksums; does not know how bytes are read (that is ReadDriver's).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "arena.h"
#include "slot_states.h"

namespace memlane {

constexpr std::uint64_t kPage = 4096;  // what direct reads are aligned to, and what a checksum covers

// One read: whole pages that hold rows [first, first + count) of a request, perhaps with unwanted bytes between.
//
//    file    |....page....|....page....|....page....|
//    rows       [ r ]          [r+1][r+2]                 r+1 straddles nothing, r+2 ends in the third page:
//    extents |<--------->|<------------------------>|    neighbouring pages join into one read
struct Extent {
  std::uint64_t offset;  // page-aligned
  std::uint32_t length;  // whole pages
  std::uint32_t needed;  // what the file must at least give: up to the end of the last row, or of its page
  std::uint32_t first;
  std::uint32_t count;
};

struct ReadFailure {
  std::int64_t position;  // among the rows asked for
  int error;              // errno; 0 = the file ended before the row; EBADMSG = its bytes fail their checksum
};

// One call of RowReader::start(). Guarded by the queue's mutex, except where it says otherwise.
struct ReadRequest {
  ReadRequest(std::vector<std::int64_t> rows_, std::vector<std::int32_t> slots_, const Arena& out_,
              const SlotStates& states_)
      : rows(std::move(rows_)), slots(std::move(slots_)), out(out_.data()), states(states_), memory(out_.lease()) {}

  std::vector<std::int64_t> rows;  // ascending, unique; not changed after the start, like slots
  std::vector<std::int32_t> slots;
  std::uint8_t* out;
  bool background = false;          // others go first
  SlotStates states;                // shared with whoever uses the rows
  std::shared_ptr<const void> memory;  // what `out` lies in
  std::vector<Extent> extents;
  std::size_t next = 0;             // extents not yet taken
  std::vector<Extent> singles;      // rows of a failed extent, each to be read on its own
  std::vector<ReadFailure> failures;
  std::size_t running = 0;          // operations taken and not settled
  std::chrono::steady_clock::time_point begun;
  std::chrono::steady_clock::time_point progressed;  // when something of it last began or ended
  std::atomic<std::size_t> settled{0};  // rows that are ready or have failed; free to read

  bool has_backlog() const { return !singles.empty() || next < extents.size(); }
  double seconds() const { return std::chrono::duration<double>(progressed - begun).count(); }
  bool done() const { return running == 0 && !has_backlog(); }
};

// An extent being read. The driver owns it; `buffer` must stay until the kernel is done with it.
struct ReadOperation {
  std::shared_ptr<ReadRequest> request;  // null once abandoned: the result will be thrown away
  Extent extent{};
  std::uint8_t* buffer = nullptr;
  std::uint32_t done = 0;     // bytes already in the buffer, a multiple of a page
  std::uint32_t reached = 0;  // the furthest byte a read has given
  int attempts = 0;           // reads that got no further
  bool reread = false;        // its checksum failed once
  bool hangs = false;         // a test wants it not to end
  std::chrono::steady_clock::time_point started{};
};

class ReadQueue {
 public:
  using Clock = std::chrono::steady_clock;
  enum class Outcome { settled, again };
  static constexpr int kHang = -1;  // in place of an errno, for inject_fault

  struct Options {
    std::uint64_t offset = 0;  // of row 0 in the file
    std::size_t stride = 0;
    std::size_t rows = 0;
    std::size_t merge_gap = 4096;       // unwanted bytes read rather than starting another read
    std::size_t longest = 512 << 10;    // bytes of one read
    double deadline = 30.0;             // seconds after which a read counts as failed
    std::vector<std::uint32_t> checksums;  // CRC32C of each page of the table's bytes; empty = unchecked
  };

  explicit ReadQueue(Options options) : options_(std::move(options)) {}

  const Options& options() const { return options_; }

  // Rows as extents, in the order of the file.
  std::vector<Extent> plan(const std::vector<std::int64_t>& rows) const;
  void add(std::shared_ptr<ReadRequest> request);

  // All below: with `mutex` held.
  bool has_backlog() const;
  bool idle() const { return requests_.empty() && in_flight == 0; }
  const Extent* peek() const;                  // what take() would give, or null
  bool take(ReadOperation& operation);         // the next extent of the oldest request; its buffer is the caller's
  // Takes note of a finished read (bytes or -errno); `again`: read on from `done`.
  Outcome settle(ReadOperation& operation, std::int64_t result);
  // Fails an operation that takes too long; its buffer must be kept until the kernel lets go of it.
  void abandon(ReadOperation& operation, int error);
  // Fails what waits too long for a place among the reads in flight.
  void expire_backlog(Clock::time_point now);
  bool still_hangs(const ReadOperation& operation) const;
  bool late(const ReadOperation& operation, Clock::time_point now) const;

  std::mutex mutex;
  std::condition_variable changed;  // rows were settled, requests were added, or stop was set
  bool stop = false;
  int release_pages_of = -1;        // a file whose pages the system shall not keep once they are read; -1: none

  // Tests: the next `times` reads that touch rows [first, last] fail with `error` or, where error is 0, end just before
  // row `first` (times < 0: for ever). kHang: they do not end until the fault is cleared, by times = 0.
  void inject_fault(std::int64_t first, std::int64_t last, int error, int times);

  std::atomic<std::uint64_t> bytes_read{0};
  std::atomic<std::uint64_t> reads{0};
  std::atomic<std::uint64_t> retries{0};
  std::atomic<std::uint64_t> corrupt_pages{0};
  std::atomic<std::int64_t> in_flight{0};

 private:
  struct Fault {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    int error = 0;
    int times = 0;
  };

  Extent extent_of(const std::vector<std::int64_t>& rows, std::uint32_t position) const;
  bool fault_hits(const ReadOperation& operation) const;
  std::int64_t with_fault(const ReadOperation& operation, std::int64_t result);
  bool deliver(ReadOperation& operation);  // false: a checksum failed for the first time
  std::uint64_t begin_of(std::int64_t row) const {
    return options_.offset + static_cast<std::uint64_t>(row) * options_.stride;
  }
  struct Pages {
    std::uint64_t first;
    std::uint64_t last;
  };
  Pages pages_of(std::int64_t row) const;  // of the table's bytes
  bool page_is_sound(const ReadOperation& operation, std::uint64_t page) const;
  void fail(ReadRequest& request, std::uint32_t position, int error);
  void fail_extent(const std::shared_ptr<ReadRequest>& request, const Extent& extent, int error);
  void finish(ReadOperation& operation);

  Options options_;
  std::deque<std::shared_ptr<ReadRequest>> requests_;  // with a backlog, oldest first, those in the background last
  Fault fault_;
};

// Carries out what the queue holds, in its own way.
class ReadDriver {
 public:
  virtual ~ReadDriver() = default;
  virtual const char* name() const = 0;
  virtual void started() = 0;  // a request was added: begin with it, without waiting
  // Returns when more rows of the request are settled than `seen`, or all, or `until` has come. Called by any thread
  // but the driver's own; where `until` has come already, it takes in what has been read and does not wait.
  virtual void wait(ReadRequest& request, std::size_t seen, ReadQueue::Clock::time_point until) = 0;
  virtual std::size_t buffer_bytes() const = 0;
};

}  // namespace memlane
