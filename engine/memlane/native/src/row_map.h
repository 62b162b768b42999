// Row id -> slot, two ways with one interface. find() costs one cache line where prefetch() was called ahead of it.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "arena.h"

namespace memlane {

// An array over all rows: the fastest while the table is not much larger than the cache. Zero pages until touched.
class DirectMap {
 public:
  static constexpr const char* kName = "direct";
  static std::size_t bytes_for(std::size_t rows, std::size_t) { return rows * sizeof(std::uint32_t); }

  DirectMap(std::size_t rows, std::size_t slots)
      : memory_(bytes_for(rows, slots)), slot_(reinterpret_cast<std::uint32_t*>(memory_.data())) {}

  void prefetch(std::uint32_t row) const { __builtin_prefetch(slot_ + row); }
  std::int32_t find(std::uint32_t row) const { return static_cast<std::int32_t>(slot_[row]) - 1; }
  void insert(std::uint32_t row, std::int32_t slot) { slot_[row] = static_cast<std::uint32_t>(slot) + 1; }
  void erase(std::uint32_t row) { slot_[row] = 0; }
  std::size_t bytes() const { return memory_.size(); }

 private:
  Arena memory_;
  std::uint32_t* slot_;  // slot + 1, 0 = not here
};

// Open addressing with linear probing, at most two thirds full, eight entries a cache line: memory follows the slots, not
// the rows, so that a table of any length can be opened.
class HashMap {
 public:
  static constexpr const char* kName = "hash";
  static std::size_t bytes_for(std::size_t, std::size_t slots) { return places(slots) * sizeof(Entry); }

  HashMap(std::size_t, std::size_t slots)
      : memory_(bytes_for(0, slots)), entry_(reinterpret_cast<Entry*>(memory_.data())), mask_(places(slots) - 1),
        shift_(64 - std::countr_zero(places(slots))) {}

  void prefetch(std::uint32_t row) const { __builtin_prefetch(entry_ + home(row)); }
  std::int32_t find(std::uint32_t row) const {
    for (std::size_t at = home(row);; at = (at + 1) & mask_) {
      const Entry entry = entry_[at];
      if (entry.slot == 0) return -1;
      if (entry.row == row) return static_cast<std::int32_t>(entry.slot) - 1;
    }
  }
  void insert(std::uint32_t row, std::int32_t slot) {
    std::size_t at = home(row);
    while (entry_[at].slot != 0) at = (at + 1) & mask_;
    entry_[at] = {row, static_cast<std::uint32_t>(slot) + 1};
  }
  // Entries behind the hole move up where their own way from home would otherwise be cut.
  void erase(std::uint32_t row) {
    std::size_t hole = home(row);
    while (entry_[hole].slot == 0 || entry_[hole].row != row) {
      if (entry_[hole].slot == 0) return;
      hole = (hole + 1) & mask_;
    }
    for (std::size_t at = (hole + 1) & mask_; entry_[at].slot != 0; at = (at + 1) & mask_) {
      if (((at - home(entry_[at].row)) & mask_) < ((at - hole) & mask_)) continue;
      entry_[hole] = entry_[at];
      hole = at;
    }
    entry_[hole] = {0, 0};
  }
  std::size_t bytes() const { return memory_.size(); }

 private:
  struct Entry {
    std::uint32_t row;
    std::uint32_t slot;  // + 1, 0 = empty
  };
  static std::size_t places(std::size_t slots) { return std::bit_ceil(slots * 3 / 2 + 16); }
  // Fibonacci hashing: the high bits of the product depend on all bits of the row.
  std::size_t home(std::uint32_t row) const {
    return static_cast<std::size_t>((row * std::uint64_t{0x9E3779B97F4A7C15}) >> shift_);
  }

  Arena memory_;
  Entry* entry_;
  std::size_t mask_;
  int shift_;
};

}  // namespace memlane
