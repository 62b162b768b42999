// Kernels without vector instructions: what every machine can run, and the twin the others are tested against.
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "order.h"

namespace memlane {
namespace {

// What a vector type offers: L floats; loads from unaligned bytes, widened to fp32; fma(a, b, c) = a * b + c with
// one rounding; max(a, b) is one of the two; not_less gives a bit per lane, set unless a < b; count_greater adds 1 in
// the lanes (of 32-bit integers) where a > b; totals adds up four times 16 partial sums in the tree of dot_row.
struct V {
  static constexpr int L = 1;
  using f = float;
  using codes = int;
  static f zero() { return 0.0F; }
  static f set1(float x) { return x; }
  static f load(const float* p) { return *p; }
  static void store(float* p, f x) { *p = x; }
  static f fma(f a, f b, f c) { return __builtin_fmaf(a, b, c); }
  static f max(f a, f b) { return a > b ? a : b; }
  static std::uint32_t not_less(f a, f b) { return a < b ? 0U : 1U; }
  static f load_f32(const std::uint8_t* p);
  static f load_bf16(const std::uint8_t* p);
  static f load_f16(const std::uint8_t* p);
  static f load_e4m3(const std::uint8_t* p);
  static f load_i8(const std::uint8_t* p) { return static_cast<float>(static_cast<std::int8_t>(*p)); }
  static codes load_codes(const std::uint8_t* p) { return *p; }
  static f low_nibbles(codes c) { return static_cast<float>((c & 15) - 8); }
  static f high_nibbles(codes c) { return static_cast<float>((c >> 4) - 8); }
  static void totals(const f* p, float* out) {
    for (int j = 0; j < 4; ++j) {
      float partial[16];
      for (int l = 0; l < 16; ++l) partial[l] = p[16 * j + l];
      for (int step = 8; step > 0; step /= 2)
        for (int l = 0; l < step; ++l) partial[l] += partial[l + step];
      out[j] = partial[0];
    }
  }
  using i = std::int32_t;
  static i zero_i() { return 0; }
  static i set1_i(std::int32_t x) { return x; }
  static i load_i(const std::int32_t* p) { return *p; }
  static void store_i(std::int32_t* p, i x) { *p = x; }
  static i count_greater(i count, i a, i b) { return count + (a > b ? 1 : 0); }
};

#include "kernels_impl.inc"

inline V::f V::load_f32(const std::uint8_t* p) { return element<RowFormat::float32>(p, 0, 1); }
inline V::f V::load_bf16(const std::uint8_t* p) { return element<RowFormat::bfloat16>(p, 0, 1); }
inline V::f V::load_f16(const std::uint8_t* p) { return element<RowFormat::float16>(p, 0, 1); }
inline V::f V::load_e4m3(const std::uint8_t* p) { return element<RowFormat::fp8>(p, 0, 1); }

}  // namespace

const KernelSet* scalar_kernels() {
  static const KernelSet set{"scalar", weighted_sum_any, dot_any, gather_any, touch, scores, top_k, count_larger};
  return &set;
}

}  // namespace memlane
