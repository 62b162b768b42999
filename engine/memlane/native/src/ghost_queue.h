// The row ids that a queue gave up last: remembered without their rows, to tell a row that comes back from a new one.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace memlane {

// A ring of the last `length` ids, found through chains from newer to older, one for each bucket of a hash:
//
//   heads_[bucket] -> entry -> older entry of the bucket -> ... -> a place written again since: the chain ends
//
// Nothing is unchained when an entry is overwritten. A link to a place written again is told by its age, which must
// grow along a chain; an entry of another bucket that is met on the way does no harm, since ids are compared.
// 8 bytes an id and 4 to 8 for the heads.
class GhostQueue {
 public:
  explicit GhostQueue(std::size_t length)
      : entries_(std::max<std::size_t>(length, 1)), heads_(std::bit_ceil(entries_.size())),
        shift_(64 - std::countr_zero(heads_.size())) {
    clear();
  }

  void clear() {
    std::fill(entries_.begin(), entries_.end(), Entry{kNoRow, kEnd});
    std::fill(heads_.begin(), heads_.end(), kEnd);
    next_ = 0;
  }
  void add(std::uint32_t row) {
    std::uint32_t& head = heads_[bucket(row)];
    entries_[next_] = {row, head};
    head = next_;
    next_ = next_ + 1 == entries_.size() ? 0 : next_ + 1;
  }
  // Whether the id is there; it is not any more.
  bool take(std::uint32_t row) {
    std::uint32_t at = heads_[bucket(row)];
    for (std::int64_t last_age = -1; at != kEnd && age(at) > last_age; at = entries_[at].older) {
      if (entries_[at].row == row) {
        entries_[at].row = kNoRow;
        return true;
      }
      last_age = age(at);
    }
    return false;
  }
  std::size_t bytes() const { return entries_.size() * sizeof(Entry) + heads_.size() * sizeof(std::uint32_t); }
  // Every id must be found along the chain of its bucket.
  std::string check() const {
    for (const Entry& entry : entries_) {
      if (entry.row == kNoRow) continue;
      std::uint32_t at = heads_[bucket(entry.row)];
      while (at != kEnd && &entries_[at] != &entry) {
        const std::uint32_t older = entries_[at].older;
        at = older != kEnd && age(older) > age(at) ? older : kEnd;
      }
      if (at == kEnd) return "ghosts: an id is in no chain";
    }
    return "";
  }

 private:
  static constexpr std::uint32_t kNoRow = 0xFFFFFFFF;
  static constexpr std::uint32_t kEnd = 0xFFFFFFFF;
  struct Entry {
    std::uint32_t row;
    std::uint32_t older;  // position of the entry before it in the same bucket
  };

  std::size_t bucket(std::uint32_t row) const {
    return heads_.size() == 1 ? 0 : (row * std::uint64_t{0x9E3779B97F4A7C15}) >> shift_;
  }
  std::int64_t age(std::uint32_t at) const {  // 0 = the newest
    const std::int64_t age = static_cast<std::int64_t>(next_) - 1 - at;
    return age >= 0 ? age : age + static_cast<std::int64_t>(entries_.size());
  }

  std::vector<Entry> entries_;
  std::vector<std::uint32_t> heads_;
  int shift_;
  std::uint32_t next_ = 0;  // where the next id goes: over the oldest
};

}  // namespace memlane
