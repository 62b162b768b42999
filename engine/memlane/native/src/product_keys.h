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

}  // namespace memlane
