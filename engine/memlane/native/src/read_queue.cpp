#include "read_queue.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "crc32c.h"

namespace memlane {

namespace {

constexpr int kAttempts = 3;  // reads without progress before giving up

std::uint64_t page_floor(std::uint64_t offset) { return offset & ~(kPage - 1); }
std::uint64_t page_ceil(std::uint64_t offset) { return page_floor(offset + kPage - 1); }

}  // namespace

Extent ReadQueue::extent_of(const std::vector<std::int64_t>& rows, std::uint32_t position) const {
  const std::uint64_t begin = begin_of(rows[position]);
  const std::uint64_t end = begin + options_.stride;
  const std::uint64_t offset = page_floor(begin);
  std::uint64_t needed = end;
  if (!options_.checksums.empty())
    needed = std::min(page_ceil(end), options_.offset + options_.rows * options_.stride);
  return {offset, static_cast<std::uint32_t>(page_ceil(end) - offset), static_cast<std::uint32_t>(needed - offset),
          position, 1};
}

// Neighbours join where reading what lies between costs less than another read; see the gap's calibration.
std::vector<Extent> ReadQueue::plan(const std::vector<std::int64_t>& rows) const {
  std::vector<Extent> extents;
  for (std::uint32_t i = 0; i < rows.size(); ++i) {
    const Extent row = extent_of(rows, i);
    if (!extents.empty()) {
      Extent& last = extents.back();
      const std::uint64_t joined = row.offset + row.length - last.offset;
      if (row.offset <= last.offset + last.length + options_.merge_gap && joined <= options_.longest) {
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

void ReadQueue::add(std::shared_ptr<ReadRequest> request) {
  request->extents = plan(request->rows);
  request->begun = request->progressed = Clock::now();
  for (const std::int32_t slot : request->slots) request->states.set(static_cast<std::size_t>(slot), SlotStates::reading);
  std::lock_guard lock(mutex);
  if (!request->has_backlog()) return;
  auto place = requests_.end();
  if (!request->background)
    place = std::find_if(requests_.begin(), requests_.end(), [](const auto& other) { return other->background; });
  requests_.insert(place, std::move(request));
}

bool ReadQueue::has_backlog() const { return !requests_.empty(); }

const Extent* ReadQueue::peek() const {
  if (requests_.empty()) return nullptr;
  const ReadRequest& request = *requests_.front();
  return request.singles.empty() ? &request.extents[request.next] : &request.singles.back();
}

bool ReadQueue::take(ReadOperation& operation) {
  if (requests_.empty()) return false;
  operation = ReadOperation{};
  operation.request = requests_.front();
  ReadRequest& request = *operation.request;
  if (!request.singles.empty()) {
    operation.extent = request.singles.back();
    request.singles.pop_back();
  } else {
    operation.extent = request.extents[request.next++];
  }
  if (!request.has_backlog()) {
    requests_.pop_front();
    if (!requests_.empty()) requests_.front()->progressed = Clock::now();  // it waited for its turn, not for the disk
  }
  ++request.running;
  ++in_flight;
  operation.started = request.progressed = Clock::now();
  operation.hangs = fault_hits(operation) && fault_.error == kHang;
  return true;
}

bool ReadQueue::fault_hits(const ReadOperation& operation) const {
  const std::uint64_t begin = operation.extent.offset + operation.done;
  const std::uint64_t end = operation.extent.offset + operation.extent.needed;
  return fault_.times != 0 && begin < fault_.end && end > fault_.begin;
}

bool ReadQueue::still_hangs(const ReadOperation& operation) const {
  return operation.hangs && fault_.times != 0 && fault_.error == kHang;
}

std::int64_t ReadQueue::with_fault(const ReadOperation& operation, std::int64_t result) {
  if (!fault_hits(operation) || fault_.error == kHang) return result;
  if (fault_.times > 0) --fault_.times;
  if (fault_.error != 0) return -fault_.error;
  const std::uint64_t begin = operation.extent.offset + operation.done;
  return std::min<std::int64_t>(result, fault_.begin <= begin ? 0 : static_cast<std::int64_t>(fault_.begin - begin));
}

// Direct reads must go on from a page border, so the tail of a short read is read once more. Others go on from where they
// ended: a file system may give less than a page at a time.
ReadQueue::Outcome ReadQueue::settle(ReadOperation& operation, std::int64_t result) {
  ++reads;
  if (operation.request == nullptr) return Outcome::settled;  // abandoned long ago
  result = with_fault(operation, result);
  int error = 0;  // the file ends here
  if (result < 0) {
    error = static_cast<int>(-result);
    if ((error == EINTR || error == EAGAIN) && ++operation.attempts < kAttempts) {
      ++retries;
      return Outcome::again;
    }
  } else {
    bytes_read += static_cast<std::uint64_t>(result);
    const bool direct = release_pages_of < 0;
    const auto reached = operation.done + static_cast<std::uint32_t>(result);
    if (reached >= operation.extent.needed) {
      if (!deliver(operation)) {  // perhaps a flipped bit on the way: look again before calling it corrupt
        operation.reread = true;
        operation.done = operation.reached = 0;
        ++retries;
        return Outcome::again;
      }
      finish(operation);
      return Outcome::settled;
    }
    operation.attempts = reached > operation.reached ? 1 : operation.attempts + 1;
    operation.reached = std::max(operation.reached, reached);
    operation.done = direct ? static_cast<std::uint32_t>(page_floor(operation.reached)) : operation.reached;
    if (operation.attempts < kAttempts) {
      ++retries;
      return Outcome::again;
    }
  }
  fail_extent(operation.request, operation.extent, error);
  finish(operation);
  return Outcome::settled;
}

void ReadQueue::abandon(ReadOperation& operation, int error) {
  if (operation.request == nullptr) return;
  ReadRequest& request = *operation.request;
  for (std::uint32_t i = 0; i < operation.extent.count; ++i) fail(request, operation.extent.first + i, error);
  finish(operation);
}

bool ReadQueue::late(const ReadOperation& operation, Clock::time_point now) const {
  return operation.request != nullptr &&
         std::chrono::duration<double>(now - operation.started).count() > options_.deadline;
}

void ReadQueue::expire_backlog(Clock::time_point now) {
  while (!requests_.empty()) {
    ReadRequest& request = *requests_.front();
    if (std::chrono::duration<double>(now - request.progressed).count() <= options_.deadline) return;
    const auto fail_all = [&](const Extent& extent) {
      for (std::uint32_t i = 0; i < extent.count; ++i) fail(request, extent.first + i, ETIMEDOUT);
    };
    for (; request.next < request.extents.size(); ++request.next) fail_all(request.extents[request.next]);
    for (const Extent& extent : request.singles) fail_all(extent);
    request.singles.clear();
    requests_.pop_front();
  }
}

ReadQueue::Pages ReadQueue::pages_of(std::int64_t row) const {
  const std::uint64_t begin = static_cast<std::uint64_t>(row) * options_.stride;
  return {begin / kPage, (begin + options_.stride - 1) / kPage};
}

bool ReadQueue::page_is_sound(const ReadOperation& operation, std::uint64_t page) const {
  const std::uint64_t begin = options_.offset + page * kPage;
  const std::uint64_t end = std::min(begin + kPage, options_.offset + options_.rows * options_.stride);
  const std::uint8_t* bytes = operation.buffer + (begin - operation.extent.offset);
  return crc32c(bytes, static_cast<std::size_t>(end - begin)) == options_.checksums[page];
}

bool ReadQueue::deliver(ReadOperation& operation) {
  ReadRequest& request = *operation.request;
  const Extent& extent = operation.extent;
  std::vector<bool> corrupt;  // by row of the extent; empty while all is sound
  if (!options_.checksums.empty()) {
    std::uint64_t unchecked = 0;  // pages below this one have been looked at
    for (std::uint32_t i = 0; i < extent.count; ++i) {
      const auto [first, last] = pages_of(request.rows[extent.first + i]);
      for (std::uint64_t page = std::max(first, unchecked); page <= last; ++page) {
        if (page_is_sound(operation, page)) continue;
        if (!operation.reread) return false;
        ++corrupt_pages;
        corrupt.resize(extent.count);
        for (std::uint32_t r = 0; r < extent.count; ++r) {  // every wanted row that touches the page is lost with it
          const auto [begin, end] = pages_of(request.rows[extent.first + r]);
          if (begin <= page && page <= end) corrupt[r] = true;
        }
      }
      unchecked = std::max(unchecked, last + 1);
    }
  }
  std::size_t delivered = 0;
  for (std::uint32_t i = 0; i < extent.count; ++i) {
    if (!corrupt.empty() && corrupt[i]) {
      fail(request, extent.first + i, EBADMSG);
      continue;
    }
    const auto slot = static_cast<std::size_t>(request.slots[extent.first + i]);
    const std::uint64_t at = begin_of(request.rows[extent.first + i]) - extent.offset;
    std::memcpy(request.out + slot * options_.stride, operation.buffer + at, options_.stride);
    request.states.set(slot, SlotStates::ready);
    ++delivered;
  }
  request.settled += delivered;
  if (release_pages_of >= 0)
    posix_fadvise(release_pages_of, static_cast<off_t>(extent.offset), static_cast<off_t>(extent.length),
                  POSIX_FADV_DONTNEED);
  return true;
}

void ReadQueue::fail(ReadRequest& request, std::uint32_t position, int error) {
  request.failures.push_back({position, error});
  request.states.set(static_cast<std::size_t>(request.slots[position]), SlotStates::failed);
  ++request.settled;
}

// One bad row must not take its neighbours along: those of a failed extent are read one by one.
void ReadQueue::fail_extent(const std::shared_ptr<ReadRequest>& request, const Extent& extent, int error) {
  if (extent.count == 1) {
    fail(*request, extent.first, error);
    return;
  }
  if (!request->has_backlog()) requests_.push_front(request);
  for (std::uint32_t r = 0; r < extent.count; ++r)
    request->singles.push_back(extent_of(request->rows, extent.first + r));
}

void ReadQueue::finish(ReadOperation& operation) {
  ReadRequest& request = *operation.request;
  --request.running;
  --in_flight;
  request.progressed = Clock::now();
  operation.request.reset();
  changed.notify_all();
}

void ReadQueue::inject_fault(std::int64_t first, std::int64_t last, int error, int times) {
  std::lock_guard lock(mutex);
  fault_ = {begin_of(first), begin_of(last + 1), error, times};
  changed.notify_all();
}

}  // namespace memlane
