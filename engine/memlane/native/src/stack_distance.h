// How deep in the order of use each row lay when it was asked for: the hit rate of LRU for every size at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "arena.h"

namespace memlane {

// Mattson, Gecsei, Slutz, Traiger 1970: an LRU cache of S slots holds the S rows used last, so a row hits in exactly
// those caches whose size is at least its stack distance, the number of different rows used since (itself included).
// One pass therefore counts the hits of all sizes.
//
//   stamp_:  row -> time of its last use + 1, 0 = never used                    4 bytes a row, zero until touched
//   alive_:  one bit for each moment: set if the row used then was not used since
//   tree_:   Fenwick tree over the number of bits set in each word of alive_
//
//       moments    | word 0 | word 1 | ...        distance = bits set from the row's stamp up to now
//       alive_     0010110010110111...            moments run out -> renumber the set bits 0, 1, 2, ... (compact)
//
// A batch is looked up before it is used, as the cache does: every id of it is measured against the order at its
// beginning, repeated ids alike; then its rows are used once each, in the order of first occurrence.
class StackDistances {
 public:
  explicit StackDistances(std::size_t rows);

  // Measures a batch, then uses its rows. Ids must be inside [0, rows). Where `counted` is false they are only used.
  void add(const std::uint32_t* ids, std::size_t count, bool counted);

  std::size_t rows() const { return rows_; }
  std::size_t different() const { return different_; }
  std::uint64_t counted() const { return counted_; }
  std::uint64_t first_uses() const { return first_uses_; }
  // Entry d: ids counted at distance d. Entry 0 is always 0. Ids counted without a last use are in first_uses().
  const std::vector<std::uint64_t>& histogram() const { return histogram_; }
  std::size_t bytes() const;

 private:
  std::uint32_t below(std::uint32_t moment) const;  // bits set before that moment
  void change(std::uint32_t moment, bool alive);
  void compact(std::size_t more);

  std::size_t rows_;
  std::size_t different_ = 0;  // rows used so far, each with one bit set
  std::uint64_t counted_ = 0;
  std::uint64_t first_uses_ = 0;
  std::uint32_t now_ = 0;
  Arena stamps_;
  std::uint32_t* stamp_;
  std::vector<std::uint64_t> alive_;
  std::vector<std::uint32_t> tree_;  // 1-based
  std::vector<std::uint64_t> histogram_;
};

}  // namespace memlane
