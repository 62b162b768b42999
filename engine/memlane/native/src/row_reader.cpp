#include "row_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace memlane {

namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::size_t kExtentBytes = 64 << 10;   // longest merged read
constexpr std::size_t kBounceBytes = 16 << 20;   // bounce buffers of one reader, together
constexpr unsigned kThreads = 32;                // blocking reads in flight without io_uring
constexpr std::size_t kFewReads = 16;             // in flight: latency counts, not the processor's time
constexpr int kAttempts = 3;                     // reads without progress before giving up

std::uint64_t page_floor(std::uint64_t offset) { return offset & ~(kPage - 1); }
std::uint64_t page_ceil(std::uint64_t offset) { return page_floor(offset + kPage - 1); }

}  // namespace

// What one call of read() works on.
struct RowReader::Batch {
  const std::int64_t* rows;
  const std::int32_t* slots;
  std::size_t count;
  std::uint8_t* out;
  std::vector<Extent> extents;
  std::size_t next = 0;            // extents not yet started
  std::vector<Extent> singles;     // rows of a failed extent, each to be read on its own
  std::vector<Failure> failures;
  std::mutex mutex;                // for the threads: next, singles, failures

  bool take(Extent& extent) {
    if (!singles.empty()) {
      extent = singles.back();
      singles.pop_back();
      return true;
    }
    if (next == extents.size()) return false;
    extent = extents[next++];
    return true;
  }
};

RowReader::RowReader(const Options& options) : options_(options) {
  if (options_.stride == 0) throw std::invalid_argument("stride must be positive");
  const std::size_t row_pages = page_ceil(options_.stride) + kPage;
  buffer_bytes_ = std::max(kExtentBytes, row_pages);
  buffers_ = static_cast<unsigned>(
      std::clamp<std::size_t>(kBounceBytes / buffer_bytes_, 4, std::max(4U, options_.depth)));

  file_ = open(options_.path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw std::system_error(errno, std::generic_category(), options_.path);
  try {
    struct stat status {};
    if (fstat(file_, &status) != 0) throw std::system_error(errno, std::generic_category(), options_.path);
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (!S_ISREG(status.st_mode)) throw std::invalid_argument(options_.path + " is not a regular file");
    if (size < options_.offset || (size - options_.offset) / options_.stride < options_.rows) {
      throw std::invalid_argument(options_.path + " has " + std::to_string(size) + " bytes; its table needs " +
                                  std::to_string(options_.offset + options_.rows * options_.stride));
    }
    bounce_ = std::make_unique<Arena>(buffers_ * buffer_bytes_);

    if (options_.allow_direct) {
      const int direct = open(options_.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
      char* const probe = reinterpret_cast<char*>(bounce_->data());
      // Some file systems accept the flag and refuse the read.
      if (direct >= 0 && (options_.rows == 0 || pread(direct, probe, kPage, 0) >= 0)) {
        close(file_);
        file_ = direct;
        direct_ = true;
      } else {
        reason_ = std::string("O_DIRECT: ") + std::strerror(errno);
        if (direct >= 0) close(direct);
      }
    } else {
      reason_ = "O_DIRECT: not asked for";
    }
    if (!direct_) posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);  // read-ahead would fetch megabytes a row

    std::string refusal = options_.allow_uring ? try_reading(true) : "not asked for";
    if (!refusal.empty()) {
      if (!reason_.empty()) reason_ += "; ";
      reason_ += "io_uring: " + refusal;
      uring_.reset();
      buffers_ = std::min(buffers_, kThreads);
      threads_ = std::make_unique<ThreadPool>(static_cast<int>(buffers_));
      refusal = try_reading(false);
      if (!refusal.empty()) throw std::runtime_error(options_.path + ": cannot be read: " + refusal);
    }
    backend_ = std::string(uring_ ? "io_uring" : "threads") + (direct_ ? "+direct" : "+buffered");
  } catch (...) {
    close(file_);
    throw;
  }
}

RowReader::~RowReader() {
  uring_.reset();  // before its buffers
  if (broken_) static_cast<void>(bounce_.release());
  close(file_);
}

// Empty, or why this way of reading does not work here. A sandbox may let the ring be set up and refuse its use.
std::string RowReader::try_reading(bool uring) {
  if (uring) {
    uring_ = std::make_unique<Uring>();
    std::string reason;
    if (!uring_->open(buffers_, reason)) return reason;
    buffers_ = std::min(buffers_, uring_->entries());
  }
  if (options_.rows == 0) return "";
  std::vector<std::uint8_t> row(options_.stride);
  const std::int64_t first = 0;
  const std::int32_t slot = 0;
  const auto failures = read(&first, &slot, 1, row.data());
  bytes_read_ = reads_ = retries_ = 0;
  if (failures.empty()) return "";
  return failures[0].error == 0 ? "short read" : std::strerror(failures[0].error);
}

Extent RowReader::extent_of(const std::int64_t* rows, std::uint32_t position) const {
  const std::uint64_t begin = options_.offset + static_cast<std::uint64_t>(rows[position]) * options_.stride;
  const std::uint64_t end = begin + options_.stride;
  const std::uint64_t offset = page_floor(begin);
  return {offset, static_cast<std::uint32_t>(page_ceil(end) - offset), static_cast<std::uint32_t>(end - offset),
          position, 1};
}

std::vector<Extent> RowReader::plan(const std::int64_t* rows, std::size_t count) const {
  std::vector<Extent> extents;
  for (std::uint32_t i = 0; i < count; ++i) {
    const Extent row = extent_of(rows, i);
    if (!extents.empty()) {
      Extent& last = extents.back();
      const std::uint64_t joined = row.offset + row.length - last.offset;
      if (row.offset <= last.offset + last.length + options_.merge_gap && joined <= buffer_bytes_) {
        last.length = static_cast<std::uint32_t>(joined);
        last.needed = static_cast<std::uint32_t>(row.offset + row.needed - last.offset);
        ++last.count;
        continue;
      }
    }
    extents.push_back(row);
  }
  return extents;
}

std::int64_t RowReader::with_fault(const Operation& operation, std::int64_t result) {
  if (!has_fault_.load(std::memory_order_relaxed)) return result;
  std::lock_guard lock(fault_mutex_);
  const std::uint64_t begin = operation.extent.offset + operation.done;
  const std::uint64_t end = operation.extent.offset + operation.extent.needed;
  if (fault_.times == 0 || begin >= fault_.end || end <= fault_.begin) return result;
  if (fault_.times > 0) --fault_.times;
  if (fault_.error != 0) return -fault_.error;
  return std::min<std::int64_t>(result, fault_.begin <= begin ? 0 : static_cast<std::int64_t>(fault_.begin - begin));
}

// What a finished read means for its extent. Direct reads must go on from a page border, so the tail of a short
// read is read once more.
RowReader::Outcome RowReader::account(Operation& operation, std::int64_t result, int& error) {
  ++reads_;
  result = with_fault(operation, result);
  if (result < 0) {
    error = static_cast<int>(-result);
    const bool transient = error == EINTR || error == EAGAIN;
    if (!transient || ++operation.attempts >= kAttempts) return Outcome::failed;
    ++retries_;
    return Outcome::again;
  }
  bytes_read_ += static_cast<std::uint64_t>(result);
  const auto reached = operation.done + static_cast<std::uint32_t>(result);
  if (reached >= operation.extent.needed) return Outcome::complete;
  operation.attempts = reached > operation.reached ? 1 : operation.attempts + 1;
  operation.reached = std::max(operation.reached, reached);
  operation.done = static_cast<std::uint32_t>(page_floor(operation.reached));
  error = 0;  // the file ends here
  if (operation.attempts >= kAttempts) return Outcome::failed;
  ++retries_;
  return Outcome::again;
}

void RowReader::deliver(const Extent& extent, const std::uint8_t* buffer, const Batch& batch) {
  for (std::uint32_t i = extent.first; i < extent.first + extent.count; ++i) {
    const std::uint64_t at =
        options_.offset + static_cast<std::uint64_t>(batch.rows[i]) * options_.stride - extent.offset;
    std::memcpy(batch.out + static_cast<std::size_t>(batch.slots[i]) * options_.stride, buffer + at, options_.stride);
  }
  // Rows are cached by us; a second copy in the page cache would grow without our bound.
  if (!direct_)
    posix_fadvise(file_, static_cast<off_t>(extent.offset), static_cast<off_t>(extent.length), POSIX_FADV_DONTNEED);
}

std::vector<RowReader::Failure> RowReader::read(const std::int64_t* rows, const std::int32_t* slots, std::size_t count,
                                                std::uint8_t* out) {
  Batch batch{rows, slots, count, out, plan(rows, count), 0, {}, {}, {}};
  if (uring_)
    read_by_uring(batch);
  else
    read_by_threads(batch);
  std::sort(batch.failures.begin(), batch.failures.end(),
            [](const Failure& a, const Failure& b) { return a.position < b.position; });
  return std::move(batch.failures);
}

void RowReader::read_by_uring(Batch& batch) {
  if (broken_) throw std::runtime_error("the io_uring of " + options_.path + " failed earlier");
  std::vector<Operation> operations(buffers_);
  std::vector<std::uint32_t> idle(buffers_);
  for (std::uint32_t i = 0; i < buffers_; ++i) idle[i] = buffers_ - 1 - i;
  std::size_t running = 0;
  const auto buffer_of = [this](std::uint32_t i) { return bounce_->data() + i * buffer_bytes_; };
  const auto queue = [&](std::uint32_t i) {
    const Operation& operation = operations[i];
    uring_->queue_read(file_, buffer_of(i) + operation.done, operation.extent.length - operation.done,
                       operation.extent.offset + operation.done, i);
  };
  Extent extent{};
  while (true) {
    while (!idle.empty() && batch.take(extent)) {
      const std::uint32_t i = idle.back();
      idle.pop_back();
      operations[i] = Operation{extent};
      queue(i);
      ++running;
    }
    in_flight_ = static_cast<std::int64_t>(running);
    if (running == 0) return;
    if (const int error = uring_->submit_and_wait(1, running <= kFewReads); error != 0) {
      broken_ = true;
      in_flight_ = 0;
      throw std::system_error(error, std::generic_category(), "io_uring_enter");
    }
    Uring::Completion completion{};
    while (uring_->next_completion(completion)) {
      const auto i = static_cast<std::uint32_t>(completion.tag);
      Operation& operation = operations[i];
      int error = 0;
      switch (account(operation, completion.result, error)) {
        case Outcome::again: queue(i); continue;
        case Outcome::complete: deliver(operation.extent, buffer_of(i), batch); break;
        case Outcome::failed:
          if (operation.extent.count == 1) {
            batch.failures.push_back({operation.extent.first, error});
          } else {  // find out which of its rows are bad
            for (std::uint32_t r = 0; r < operation.extent.count; ++r)
              batch.singles.push_back(extent_of(batch.rows, operation.extent.first + r));
          }
          break;
      }
      idle.push_back(i);
      --running;
    }
  }
}

bool RowReader::read_blocking(const Extent& extent, std::uint8_t* buffer, const Batch& batch, int& error) {
  Operation operation{extent};
  ++in_flight_;
  Outcome outcome = Outcome::again;
  while (outcome == Outcome::again) {
    const ssize_t result = pread(file_, buffer + operation.done, extent.length - operation.done,
                                 static_cast<off_t>(extent.offset + operation.done));
    outcome = account(operation, result < 0 ? -errno : result, error);
  }
  --in_flight_;
  if (outcome == Outcome::complete) deliver(extent, buffer, batch);
  return outcome == Outcome::complete;
}

void RowReader::read_by_threads(Batch& batch) {
  const auto parts = static_cast<int>(std::min<std::size_t>(buffers_, batch.extents.size()));
  threads_->parallel_for(parts, [&](int part) {
    std::uint8_t* buffer = bounce_->data() + static_cast<std::size_t>(part) * buffer_bytes_;
    while (true) {
      Extent extent{};
      {
        std::lock_guard lock(batch.mutex);
        if (!batch.take(extent)) return;
      }
      int error = 0;
      if (read_blocking(extent, buffer, batch, error)) continue;
      std::lock_guard lock(batch.mutex);
      if (extent.count == 1) {
        batch.failures.push_back({extent.first, error});
      } else {
        for (std::uint32_t r = 0; r < extent.count; ++r)
          batch.singles.push_back(extent_of(batch.rows, extent.first + r));
      }
    }
  });
}

void RowReader::inject_fault(std::int64_t first, std::int64_t last, int error, int times) {
  std::lock_guard lock(fault_mutex_);
  const auto byte = [this](std::int64_t row) {
    return options_.offset + static_cast<std::uint64_t>(row) * options_.stride;
  };
  fault_ = {byte(first), byte(last + 1), error, times};
  has_fault_ = times != 0;
}

}  // namespace memlane
