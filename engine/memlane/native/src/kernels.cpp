#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "order.h"

namespace memlane {

std::size_t row_stride(RowFormat format, std::size_t width) {
  switch (format) {
    case RowFormat::float32: return 4 * width;
    case RowFormat::int8: case RowFormat::fp8: return width + 2;
    case RowFormat::int4: return width / 2 + 2;
    default: return 2 * width;
  }
}

namespace {

const KernelSet* fastest() {
  if (const auto* set = avx512_kernels()) return set;
  if (const auto* set = avx2_kernels()) return set;
  return scalar_kernels();
}

std::atomic<const KernelSet*> chosen{nullptr};

}  // namespace

const KernelSet& kernels() {
  const KernelSet* set = chosen.load(std::memory_order_relaxed);
  if (set == nullptr) {
    set = fastest();
    chosen.store(set, std::memory_order_relaxed);
  }
  return *set;
}

bool force_kernels(const char* name) {
  if (*name == '\0') {
    chosen.store(fastest());
    return true;
  }
  for (const auto* set : {scalar_kernels(), avx2_kernels(), avx512_kernels()}) {
    if (set != nullptr && std::strcmp(set->name, name) == 0) {
      chosen.store(set);
      return true;
    }
  }
  return false;
}

void top_k_of_candidates(const float* scores, const std::int32_t* candidates, int count, int k, float* values,
                         std::int32_t* ids) {
  std::vector<std::uint64_t> keys(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i)
    keys[static_cast<std::size_t>(i)] = order_key(scores[candidates[i]], static_cast<std::uint32_t>(candidates[i]));
  std::partial_sort(keys.begin(), keys.begin() + k, keys.end(), std::greater<>());
  for (int i = 0; i < k; ++i) {
    ids[i] = static_cast<std::int32_t>(order_key_id(keys[static_cast<std::size_t>(i)]));
    values[i] = scores[ids[i]];
  }
}

}  // namespace memlane
