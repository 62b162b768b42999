// Memory for reads under way: one arena cut into pieces of whole chunks, first fit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "arena.h"

namespace memlane {

class Buffers {
 public:
  static constexpr std::size_t kChunk = 16 << 10;

  explicit Buffers(std::size_t bytes) : memory_(bytes / kChunk * kChunk), taken_(bytes / kChunk, false) {}

  std::size_t size() const { return memory_.size(); }
  std::uint8_t* data() const { return memory_.data(); }

  std::uint8_t* take(std::size_t bytes) {  // null: no room now
    const std::size_t wanted = chunks(bytes);
    std::size_t run = 0;
    for (std::size_t tried = 0, at = next_; tried < taken_.size(); ++tried, ++at) {
      if (at == taken_.size()) at = run = 0;  // pieces do not wrap around
      run = taken_[at] ? 0 : run + 1;
      if (run < wanted) continue;
      const std::size_t first = at + 1 - wanted;
      for (std::size_t i = first; i <= at; ++i) taken_[i] = true;
      next_ = at + 1 == taken_.size() ? 0 : at + 1;
      return memory_.data() + first * kChunk;
    }
    return nullptr;
  }

  void give_back(const std::uint8_t* piece, std::size_t bytes) {
    const std::size_t first = static_cast<std::size_t>(piece - memory_.data()) / kChunk;
    for (std::size_t i = 0; i < chunks(bytes); ++i) taken_[first + i] = false;
  }

 private:
  static std::size_t chunks(std::size_t bytes) { return (bytes + kChunk - 1) / kChunk; }

  Arena memory_;
  std::vector<bool> taken_;
  std::size_t next_ = 0;
};

}  // namespace memlane
