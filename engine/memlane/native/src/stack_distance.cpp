#include "stack_distance.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace memlane {

namespace {

constexpr std::size_t kWord = 64;
constexpr std::size_t kFewestMoments = std::size_t{1} << 16;
constexpr std::size_t kMostMoments = (std::size_t{1} << 32) - kWord;  // stamps hold a moment + 1 in 32 bits
constexpr std::size_t kFetch = 16;  // stamps are asked for this many ids ahead of their turn

}  // namespace

StackDistances::StackDistances(std::size_t rows)
    : rows_(rows), stamps_(rows * sizeof(std::uint32_t)), stamp_(reinterpret_cast<std::uint32_t*>(stamps_.data())),
      histogram_(1, 0) {
  if (rows > INT32_MAX) throw std::invalid_argument("rows must fit 31 bits");
}

std::uint32_t StackDistances::below(std::uint32_t moment) const {
  const std::size_t word = moment / kWord;
  const std::uint64_t lower = (std::uint64_t{1} << (moment % kWord)) - 1;
  auto sum = static_cast<std::uint32_t>(std::popcount(alive_[word] & lower));
  for (std::size_t i = word; i > 0; i &= i - 1) sum += tree_[i];
  return sum;
}

void StackDistances::change(std::uint32_t moment, bool alive) {
  alive_[moment / kWord] ^= std::uint64_t{1} << (moment % kWord);
  const std::uint32_t step = alive ? 1 : UINT32_MAX;  // unsigned wrap: minus one
  for (std::size_t i = moment / kWord + 1; i < tree_.size(); i += i & (~i + 1)) tree_[i] += step;
}

// Renumbers the moments that still count, in their order, and makes room for at least as many new ones and `more`.
void StackDistances::compact(std::size_t more) {
  std::vector<std::uint32_t> before(alive_.size() + 1, 0);  // bits set before each word
  for (std::size_t word = 0; word < alive_.size(); ++word)
    before[word + 1] = before[word] + static_cast<std::uint32_t>(std::popcount(alive_[word]));
  if (different_ > 0) {
    for (std::size_t row = 0; row < rows_; ++row) {
      if (stamp_[row] == 0) continue;
      const std::uint32_t moment = stamp_[row] - 1;
      const std::uint64_t lower = (std::uint64_t{1} << (moment % kWord)) - 1;
      stamp_[row] = before[moment / kWord] + static_cast<std::uint32_t>(std::popcount(alive_[moment / kWord] & lower)) + 1;
    }
  }
  const std::size_t needed = different_ + more;
  std::size_t moments = std::min(std::max({2 * needed, 4 * different_, kFewestMoments}), kMostMoments);
  moments = (std::max(moments, needed) + kWord - 1) / kWord * kWord;
  alive_.assign(moments / kWord, 0);
  for (std::size_t word = 0; word < different_ / kWord; ++word) alive_[word] = UINT64_MAX;
  if (different_ % kWord != 0) alive_[different_ / kWord] = (std::uint64_t{1} << (different_ % kWord)) - 1;
  tree_.assign(alive_.size() + 1, 0);
  for (std::size_t i = 1; i < tree_.size(); ++i) {
    tree_[i] += static_cast<std::uint32_t>(std::popcount(alive_[i - 1]));
    const std::size_t parent = i + (i & (~i + 1));
    if (parent < tree_.size()) tree_[parent] += tree_[i];
  }
  now_ = static_cast<std::uint32_t>(different_);
}

void StackDistances::add(const std::uint32_t* ids, std::size_t count, bool counted) {
  const std::size_t most = std::min(count, rows_);  // moments that this batch can take
  if (now_ + most > alive_.size() * kWord) compact(most);
  if (counted) {
    counted_ += count;
    histogram_.resize(std::max(histogram_.size(), different_ + 1));
    const auto all = static_cast<std::uint32_t>(different_);
    for (std::size_t i = 0; i < count; ++i) {
      if (i + kFetch < count) __builtin_prefetch(stamp_ + ids[i + kFetch]);
      const std::uint32_t stamp = stamp_[ids[i]];
      if (stamp == 0)
        ++first_uses_;
      else
        ++histogram_[all - below(stamp - 1)];
    }
  }
  const std::uint32_t begun = now_;
  for (std::size_t i = 0; i < count; ++i) {
    if (i + kFetch < count) __builtin_prefetch(stamp_ + ids[i + kFetch]);
    std::uint32_t& stamp = stamp_[ids[i]];
    if (stamp > begun) continue;  // used by this batch already
    if (stamp == 0)
      ++different_;
    else
      change(stamp - 1, false);
    change(now_, true);
    stamp = ++now_;
  }
}

std::size_t StackDistances::bytes() const {
  return stamps_.size() + alive_.size() * sizeof(alive_[0]) + tree_.size() * sizeof(tree_[0]) +
         histogram_.size() * sizeof(histogram_[0]);
}

}  // namespace memlane
