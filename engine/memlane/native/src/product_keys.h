// Exact top-k over the sums of two sub-key score sets (product keys, Lample et al. 2019, section 3.2).
#pragma once

#include <cstddef>
#include <cstdint>

namespace memlane {

constexpr int kMostKeys = 65536;  // so that a row id fits 32 bits

// scores [m, 2, n] -> ids [m, k] (first key * n + second key) and their sums [m, k], best first. Each half's top k
// are taken (ties to the smaller key); of their pairs those that at most k-1 others dominate compete (ties to the
// smaller row). Needs 1 <= k <= n <= kMostKeys.
void select_product_keys(const float* scores, std::size_t m, int n, int k, std::int64_t* ids, float* sums);

// The whole search: query [tokens, heads, 2, width] and keys [heads, 2, n, width] -> ids and sums [tokens, heads, k],
// chosen as above by score = query . key. What is chosen for a token does not depend on the other tokens.
// Needs n >= 4. Scores are made and searched in tiles that stay in the processor's cache.
struct KeySearch {
  const float* query;
  const float* keys;
  std::size_t tokens;
  std::size_t heads;
  std::size_t width;
  int n;
  int k;
};
void search_product_keys(const KeySearch& search, std::int64_t* ids, float* sums);

}  // namespace memlane
