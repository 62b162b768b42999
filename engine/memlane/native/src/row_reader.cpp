#include "row_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "thread_driver.h"
#include "uring_driver.h"

namespace memlane {

namespace {

constexpr std::size_t kBufferBytes = 8 << 20;  // for the reads in flight, together
constexpr unsigned kThreads = 32;               // blocking reads in flight without io_uring

}  // namespace

RowReader::RowReader(const Options& options) : process_(getpid()) {
  if (options.queue.stride == 0) throw std::invalid_argument("stride must be positive");
  ReadQueue::Options queue = options.queue;
  queue.longest = std::max<std::size_t>(queue.longest, (queue.stride + 3 * kPage - 1) / kPage * kPage);
  queue_ = std::make_shared<ReadQueue>(std::move(queue));
  file_ = open(options.path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw std::system_error(errno, std::generic_category(), options.path);
  try {
    check_size(options);
    open_file(options);
    std::string refusal = choose_driver(options);
    if (!refusal.empty()) throw std::runtime_error(options.path + ": cannot be read: " + refusal);
  } catch (...) {
    driver_.reset();
    close(file_);
    throw;
  }
  backend_ = std::string(driver_->name()) + (direct_ ? "+direct" : "+buffered");
}

RowReader::~RowReader() {
  if (process_ != getpid()) static_cast<void>(driver_.release());  // its threads are not ours to wait for
  driver_.reset();
  close(file_);
}

void RowReader::check_size(const Options& options) const {
  const auto& table = options.queue;
  struct stat status {};
  if (fstat(file_, &status) != 0) throw std::system_error(errno, std::generic_category(), options.path);
  if (!S_ISREG(status.st_mode)) throw std::invalid_argument(options.path + " is not a regular file");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size < table.offset || (size - table.offset) / table.stride < table.rows) {
    throw std::invalid_argument(options.path + " has " + std::to_string(size) + " bytes; its table needs " +
                                std::to_string(table.offset + table.rows * table.stride));
  }
  const std::size_t pages = (table.rows * table.stride + kPage - 1) / kPage;
  if (!table.checksums.empty() && (table.checksums.size() != pages || table.offset % kPage != 0))
    throw std::invalid_argument(options.path + ": its checksums do not match its table's pages");
}

void RowReader::open_file(const Options& options) {
  if (!options.allow_direct) {
    reason_ = "O_DIRECT: not asked for";
  } else {
    const int direct = open(options.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    const Arena probe(kPage);
    // Some file systems accept the flag and refuse the read.
    if (direct >= 0 && pread(direct, probe.data(), kPage, 0) >= 0) {
      close(file_);
      file_ = direct;
      direct_ = true;
    } else {
      reason_ = std::string("O_DIRECT: ") + std::strerror(errno);
      if (direct >= 0) close(direct);
    }
  }
  if (!direct_) posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);  // read-ahead would fetch megabytes a row
}

// Empty, or why the file cannot be read at all.
std::string RowReader::choose_driver(const Options& options) {
  // Rows are cached by us; a second copy in the page cache would grow without our bound.
  queue_->release_pages_of = direct_ ? -1 : file_;
  std::string refusal = "not asked for";
  if (options.allow_uring) {
    driver_ = UringDriver::make(queue_, {file_, options.depth, std::max(kBufferBytes, 4 * queue_->options().longest),
                                         options.fixed_buffers}, refusal);
    if (driver_ != nullptr) refusal = try_reading();
    if (refusal.empty()) return "";
    driver_.reset();
    queue_->stop = false;
  }
  reason_ += (reason_.empty() ? "io_uring: " : "; io_uring: ") + refusal;
  const int file = fcntl(file_, F_DUPFD_CLOEXEC, 0);
  if (file < 0) return std::strerror(errno);
  driver_ = std::make_unique<ThreadDriver>(queue_, file, std::min(kThreads, std::max(1U, options.depth)),
                                           queue_->options().longest);
  return try_reading();
}

// A sandbox may let a ring be set up and refuse its use; a file system may refuse the first read.
std::string RowReader::try_reading() {
  if (queue_->options().rows == 0) return "";
  const Arena row(queue_->options().stride);
  const SlotStates state(1);
  const auto failures = finish(*start({0}, {0}, row, state));
  queue_->bytes_read = queue_->reads = queue_->retries = queue_->corrupt_pages = 0;
  // A row that is damaged, on the medium or in its bytes, says nothing against the way it was read.
  if (failures.empty() || failures[0].error == EBADMSG || failures[0].error == EIO) return "";
  return failures[0].error == 0 ? "short read" : std::strerror(failures[0].error);
}

std::shared_ptr<ReadRequest> RowReader::start(std::vector<std::int64_t> rows, std::vector<std::int32_t> slots,
                                              const Arena& out, const SlotStates& states, bool background) {
  require_own_process();
  auto request = std::make_shared<ReadRequest>(std::move(rows), std::move(slots), out, states);
  request->background = background;
  queue_->add(request);
  driver_->started();
  return request;
}

std::vector<ReadFailure> RowReader::finish(ReadRequest& request) {
  while (request.settled < request.rows.size()) wait(request, request.settled);
  std::lock_guard lock(queue_->mutex);
  std::sort(request.failures.begin(), request.failures.end(),
            [](const ReadFailure& a, const ReadFailure& b) { return a.position < b.position; });
  return request.failures;
}

void RowReader::drain() {
  constexpr std::chrono::milliseconds kTick{20};
  ReadRequest nobody({}, {}, Arena(0), SlotStates(0));
  nobody.running = 1;  // never done: waiting for it is driving what others asked for
  while (true) {
    {
      std::lock_guard lock(queue_->mutex);
      if (queue_->idle()) return;
    }
    wait(nobody, 0, ReadQueue::Clock::now() + kTick);
  }
}

void RowReader::require_own_process() const {
  if (process_ != getpid()) throw std::runtime_error("a table cannot be read in a process forked from the one that opened it");
}

std::int64_t RowReader::page_cache_bytes() const {
#if defined(__linux__)
  // cachestat(2), Linux 6.5; older headers do not know it.
  struct Range {
    std::uint64_t offset, length;
  } range{0, 0};
  struct Result {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } result{};
  constexpr long kCachestat = 451;
  if (syscall(kCachestat, file_, &range, &result, 0U) == 0) return static_cast<std::int64_t>(result.cached * kPage);
#endif
  return -1;
}

}  // namespace memlane
