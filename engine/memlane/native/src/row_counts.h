// How often each row was asked for of late, in one byte a row; or in a fixed number of bytes a slot for long tables.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "arena.h"

namespace memlane {

// Every `period` counts, all counters are halved: what was asked for a period ago weighs half.
//
//   short table:  counter[row], exact up to 255
//   long table:   two counters a row in one cache line, shared with other rows; the smaller one is the better guess
//                 (a count-min sketch in blocks, with conservative update)
class RowCounts {
 public:
  RowCounts(std::size_t rows, std::size_t slots)
      : direct_(rows <= std::max(slots * kDirect, kSmall)),
        memory_(direct_ ? rows : std::bit_ceil(std::max(slots * kHashed, kSmall))), count_(memory_.data()),
        shift_(64 - std::countr_zero(std::bit_ceil(memory_.size()) / kLine)), period_(memory_.size() * kReads) {}

  void clear() {
    std::fill(count_, count_ + memory_.size(), std::uint8_t{0});
    since_halved_ = 0;
  }
  void prefetch(std::uint32_t row) const { __builtin_prefetch(count_ + (direct_ ? row : places(row).first), 1); }
  std::uint8_t of(std::uint32_t row) const {
    if (direct_) return count_[row];
    const Places at = places(row);
    return std::min(count_[at.first], count_[at.second]);
  }
  void add(std::uint32_t row) {
    if (direct_) {
      raise(count_[row]);
    } else {
      const Places at = places(row);
      const std::uint8_t least = std::min(count_[at.first], count_[at.second]);
      if (count_[at.first] == least) raise(count_[at.first]);
      if (count_[at.second] == least) raise(count_[at.second]);
    }
    if (++since_halved_ >= period_) halve();
  }
  void forget(std::uint32_t row) {
    if (direct_) count_[row] = 0;  // a shared counter stays: it speaks for other rows too
  }
  std::size_t bytes() const { return memory_.size(); }

 private:
  static constexpr std::size_t kReads = 4;     // counts per counter between two halvings
  static constexpr std::size_t kDirect = 64;   // rows a slot up to which each row has a counter of its own
  static constexpr std::size_t kHashed = 32;   // counters a slot, and up to twice that, otherwise
  static constexpr std::size_t kSmall = 4096;  // bytes not worth saving
  static constexpr std::size_t kLine = 64;
  struct Places {
    std::size_t first;
    std::size_t second;
  };

  Places places(std::uint32_t row) const {
    const std::uint64_t hash = row * std::uint64_t{0x9E3779B97F4A7C15};
    const std::size_t line = static_cast<std::size_t>(hash >> shift_) * kLine;
    return {line + ((hash >> 20) & 31), line + 32 + ((hash >> 25) & 31)};
  }
  static void raise(std::uint8_t& count) { count = static_cast<std::uint8_t>(count + (count < 255 ? 1 : 0)); }
  void halve() {
    for (std::size_t i = 0; i < memory_.size(); ++i) count_[i] = static_cast<std::uint8_t>(count_[i] >> 1);
    since_halved_ = 0;
  }

  bool direct_;
  Arena memory_;
  std::uint8_t* count_;
  int shift_;
  std::size_t period_;
  std::size_t since_halved_ = 0;
};

}  // namespace memlane
