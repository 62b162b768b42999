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
        place_(padded(pairs.size())), which_(pairs.size()) {}

  void select(const float* scores, std::int64_t* ids, float* sums) {
    for (int half = 0; half < 2; ++half)
      kernels_.top_k(scores + half * n_, n_, k_, values_.data() + half * k_, ids_.data() + half * k_, scratch_.data());
    const int count = candidate_pairs();
    if (!ranked(count, ids, sums)) sorted(count, ids, sums);
  }

 private:
  static std::size_t size(int n) { return static_cast<std::size_t>(n); }
  static std::size_t padded(std::size_t n) { return (n + 15) / 16 * 16; }

  std::uint32_t row(int candidate) const {
    const auto [a, b] = pairs_[size(which_[size(candidate)])];
    return static_cast<std::uint32_t>(ids_[size(a)]) * static_cast<std::uint32_t>(n_) +
           static_cast<std::uint32_t>(ids_[size(k_ + b)]);
  }

  // Pairs that reach the smallest of the first k sums, in sums_ and which_.
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
      which_[size(count)] = static_cast<std::int32_t>(p);
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
      ids[i] = row(p);
      sums[i] = sums_[size(p)];
    }
    return true;
  }

  void sorted(int count, std::int64_t* ids, float* sums) {
    std::vector<std::pair<std::uint64_t, float>> order(size(count));
    for (std::size_t i = 0; i < size(count); ++i) order[i] = {order_key(sums_[i], row(static_cast<int>(i))), sums_[i]};
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
  std::vector<std::int32_t> which_;
};

// The pairs for this k; valid until this thread asks for another k. A model asks for the same k again and again.
const std::vector<Pair>& pairs_for(int k) {
  thread_local std::vector<Pair> pairs;
  thread_local int pairs_k = 0;
  if (pairs_k != k) {
    pairs = undominated_pairs(k);
    pairs_k = k;
  }
  return pairs;
}

// Tokens whose scores of one head are made and searched together: 32 x 2 x 1,024 scores are 256 KiB, and the keys of
// the head, read once a tile, are then used often enough to come from a farther cache.
constexpr std::size_t kTile = 32;
constexpr std::size_t kProductsPerThread = 256 << 10;  // fewer cost less than waking a thread

// Scores and searches tiles, with memory of its own.
class Searcher {
 public:
  Searcher(const KeySearch& search, const std::vector<Pair>& pairs, std::size_t tile)
      : search_(search), n_(static_cast<std::size_t>(search.n)), step_(2 * n_ + 16), scores_(tile * step_),
        queries_(tile * search.width), selector_(search.n, search.k, pairs) {}

  void tile(std::size_t head, std::size_t begin, std::size_t end, std::int64_t* ids, float* sums) {
    for (std::size_t half = 0; half < 2; ++half) score(2 * head + half, begin, end, scores_.data() + half * n_);
    for (std::size_t token = begin; token < end; ++token) {
      const auto at = (token * search_.heads + head) * static_cast<std::size_t>(search_.k);
      selector_.select(scores_.data() + (token - begin) * step_, ids + at, sums + at);
    }
  }

 private:
  void score(std::size_t plane, std::size_t begin, std::size_t end, float* out) {
    const std::size_t width = search_.width;
    const auto* query = search_.query + plane * width;
    const std::size_t query_step = 2 * search_.heads * width;
    // Side by side: queries a power of two apart would evict each other from the first-level cache.
    for (std::size_t token = begin; token < end; ++token)
      std::copy_n(query + token * query_step, width, queries_.data() + (token - begin) * width);
    kernels().scores(queries_.data(), width, end - begin, search_.keys + plane * n_ * width, n_, width, out, step_);
  }

  const KeySearch& search_;
  const std::size_t n_;
  const std::size_t step_;  // not a power of two, for the same reason
  std::vector<float> scores_;
  std::vector<float> queries_;
  Selector selector_;
};

}  // namespace

void select_product_keys(const float* scores, std::size_t m, int n, int k, std::int64_t* ids, float* sums) {
  const std::vector<Pair>& pairs = pairs_for(k);  // the caller's, not each worker's own
  parallel_ranges(m, 32, [&](std::size_t begin, std::size_t end) {
    Selector selector(n, k, pairs);
    for (std::size_t i = begin; i < end; ++i) {
      const auto row = static_cast<std::size_t>(k) * i;
      selector.select(scores + 2 * static_cast<std::size_t>(n) * i, ids + row, sums + row);
    }
  });
}

void search_product_keys(const KeySearch& search, std::int64_t* ids, float* sums) {
  if (search.tokens == 0) return;
  const std::vector<Pair>& pairs = pairs_for(search.k);
  const auto threads = static_cast<std::size_t>(get_threads());
  const std::size_t fair = (search.tokens * search.heads + threads - 1) / threads;  // enough tiles for every thread
  const std::size_t tile = std::min({kTile, search.tokens, (fair + 3) / 4 * 4});
  const std::size_t tiles = (search.tokens + tile - 1) / tile;
  const std::size_t products = 2 * static_cast<std::size_t>(search.n) * search.width * tile;
  const std::size_t least = std::max<std::size_t>(1, kProductsPerThread / products);
  parallel_ranges(search.heads * tiles, least, [&](std::size_t first, std::size_t last) {
    Searcher searcher(search, pairs, tile);
    for (std::size_t i = first; i < last; ++i) {
      const std::size_t begin = i % tiles * tile;
      searcher.tile(i / tiles, begin, std::min(begin + tile, search.tokens), ids, sums);
    }
  });
}

}  // namespace memlane
