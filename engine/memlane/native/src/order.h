// Floats as integers that sort the same way.
#pragma once

#include <bit>
#include <cstdint>

namespace memlane {

// Larger float -> larger int. -0 equals +0; a NaN without its sign bit sorts above +inf (as torch.topk has it),
// with it below -inf: either way the order is total and the caller's indices stay valid.
static inline std::int32_t ordered(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value + 0.0F);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The float that `ordered` made this of (a zero without its sign).
static inline float unordered(std::int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7FFFFFFF));
}

// Sorts by score descending, then id ascending, when sorted by key descending.
static inline std::uint64_t order_key(float score, std::uint32_t id) {
  const auto high = static_cast<std::uint32_t>(ordered(score)) ^ 0x80000000U;
  return (static_cast<std::uint64_t>(high) << 32) | (0xFFFFFFFFU - id);
}

static inline std::uint32_t order_key_id(std::uint64_t key) { return 0xFFFFFFFFU - static_cast<std::uint32_t>(key); }

}  // namespace memlane
