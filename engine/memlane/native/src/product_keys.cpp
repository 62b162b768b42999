#include "product_keys.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "kernels.h"
#include "order.h"
#include "thread_pool.h"

namespace memlane {

namespace {

// Ranks a and b (0-based) of the two halves' best; (a+1)(b+1) - 1 other pairs have a sum at least as large, so
// pairs with (a+1)(b+1) > k cannot be needed.
//
//        b 0 1 2 3 4 5 6 7            k = 8: 20 of the 64 pairs remain; the first k of them in order of
//      a 0 . . . . . . . .            (a+1)(b+1) give a lower bound of the k-th best sum.
//        1 . . . .
//        2 . .
//        3 . .
//        4 .
struct Pair {
  std::int32_t a;
  std::int32_t b;
};

std::vector<Pair> undominated_pairs(int k) {
  std::vector<Pair> pairs;
  for (int a = 0; a < k; ++a)
    for (int b = 0; (a + 1) * (b + 1) <= k; ++b) pairs.push_back({a, b});
  std::stable_sort(pairs.begin(), pairs.end(),
                   [](Pair x, Pair y) { return (x.a + 1) * (x.b + 1) < (y.a + 1) * (y.b + 1); });
  return pairs;
}

class Selector {
 public:
  Selector(int n, int k, const std::vector<Pair>& pairs)
      : n_(n), k_(k), pairs_(pairs), kernels_(kernels()), values_(2 * size(k)), ids_(2 * size(k)),
        scratch_(size(n) + 64), sums_(pairs.size()), keys_(padded(pairs.size())), rank_(padded(pairs.size())),
        place_(padded(pairs.size())), rows_(pairs.size()) {}

  void select(const float* scores, std::int64_t* ids, float* sums) {
    for (int half = 0; half < 2; ++half)
      kernels_.top_k(scores + half * n_, n_, k_, values_.data() + half * k_, ids_.data() + half * k_, scratch_.data());
    const int count = candidate_pairs();
    if (!ranked(count, ids, sums)) sorted(count, ids, sums);
  }

 private:
  static std::size_t size(int n) { return static_cast<std::size_t>(n); }
  static std::size_t padded(std::size_t n) { return (n + 15) / 16 * 16; }

  // Pairs that reach the smallest of the first k sums, in sums_ and rows_.
  int candidate_pairs() {
    const float* first = values_.data();
    const float* second = first + k_;
    std::int32_t bound = INT32_MAX;
    int count = 0;
    for (std::size_t p = 0; p < pairs_.size(); ++p) {
      const auto [a, b] = pairs_[p];
      const float sum = first[a] + second[b];
      const std::int32_t key = ordered(sum);
      if (p < size(k_)) bound = std::min(bound, key);
      sums_[size(count)] = sum;
      keys_[size(count)] = key;
      rows_[size(count)] = static_cast<std::uint32_t>(ids_[size(a)]) * static_cast<std::uint32_t>(n_) +
                           static_cast<std::uint32_t>(ids_[size(k_ + b)]);
      count += p < size(k_) || key >= bound ? 1 : 0;
    }
    return count;
  }

  // The usual case: no two of the k best sums are equal, so counting the larger ones gives each its place.
  bool ranked(int count, std::int64_t* ids, float* sums) {
    for (std::size_t i = size(count); i < padded(size(count)); ++i) keys_[i] = INT32_MIN;
    kernels_.count_larger(keys_.data(), count, rank_.data());
    std::fill_n(place_.begin(), k_, -1);
    for (int i = 0; i < count; ++i) {
      const std::int32_t rank = rank_[size(i)];
      if (rank >= k_) continue;
      if (place_[size(rank)] >= 0) return false;
      place_[size(rank)] = i;
    }
    for (int i = 0; i < k_; ++i) {
      const std::int32_t p = place_[size(i)];
      if (p < 0) return false;
      ids[i] = rows_[size(p)];
      sums[i] = sums_[size(p)];
    }
    return true;
  }

  void sorted(int count, std::int64_t* ids, float* sums) {
    std::vector<std::pair<std::uint64_t, float>> order(size(count));
    for (std::size_t i = 0; i < size(count); ++i) order[i] = {order_key(sums_[i], rows_[i]), sums_[i]};
    std::partial_sort(order.begin(), order.begin() + k_, order.end(),
                      [](const auto& x, const auto& y) { return x.first > y.first; });
    for (int i = 0; i < k_; ++i) {
      ids[i] = order_key_id(order[size(i)].first);
      sums[i] = order[size(i)].second;
    }
  }

  const int n_;
  const int k_;
  const std::vector<Pair>& pairs_;
  const KernelSet& kernels_;
  std::vector<float> values_;
  std::vector<std::int32_t> ids_;
  std::vector<std::int32_t> scratch_;
  std::vector<float> sums_;
  std::vector<std::int32_t> keys_;
  std::vector<std::int32_t> rank_;
  std::vector<std::int32_t> place_;
  std::vector<std::uint32_t> rows_;
};

}  // namespace

void select_product_keys(const float* scores, std::size_t m, int n, int k, std::int64_t* ids, float* sums) {
  thread_local std::vector<Pair> pairs;  // a model asks for the same k again and again
  thread_local int pairs_k = 0;
  if (pairs_k != k) {
    pairs = undominated_pairs(k);
    pairs_k = k;
  }
  const std::vector<Pair>& shared = pairs;  // the caller's, not each worker's own
  parallel_ranges(m, 32, [&](std::size_t begin, std::size_t end) {
    Selector selector(n, k, shared);
    for (std::size_t i = begin; i < end; ++i) {
      const auto row = static_cast<std::size_t>(k) * i;
      selector.select(scores + 2 * static_cast<std::size_t>(n) * i, ids + row, sums + row);
    }
  });
}

}  // namespace memlane
