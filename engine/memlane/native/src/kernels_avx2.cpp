// Kernels for AVX2 with FMA and F16C (x86-64-v3).
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "order.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi")
#endif

namespace memlane {
namespace {

struct V {
  static constexpr int L = 8;
  using f = __m256;
  using codes = __m256i;
  static f zero() { return _mm256_setzero_ps(); }
  static f set1(float x) { return _mm256_set1_ps(x); }
  static f load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, f x) { _mm256_storeu_ps(p, x); }
  static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
  static f max(f a, f b) { return _mm256_max_ps(a, b); }
  static std::uint32_t not_less(f a, f b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
  }
  static __m128i load_16(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i load_8(const std::uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static f load_f32(const std::uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static f load_bf16(const std::uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
  }
  static f load_f16(const std::uint8_t* p) { return _mm256_cvtph_ps(load_16(p)); }
  static f load_e4m3(const std::uint8_t* p) {  // sign-extended, so that the shift brings the sign to bits 15 and 14
    const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(load_8(p)), 7);
    return _mm256_cvtph_ps(_mm_and_si128(shifted, _mm_set1_epi16(static_cast<short>(0xBF80))));
  }
  static f load_i8(const std::uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8(p))); }
  static codes load_codes(const std::uint8_t* p) { return _mm256_cvtepu8_epi32(load_8(p)); }
  static f nibbles(__m256i unsigned_codes) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(unsigned_codes, _mm256_set1_epi32(8)));
  }
  static f low_nibbles(codes c) { return nibbles(_mm256_and_si256(c, _mm256_set1_epi32(15))); }
  static f high_nibbles(codes c) { return nibbles(_mm256_srli_epi32(c, 4)); }
  static __m128 quarters(f low, f high) {  // 16 partial sums -> 4
    const f eight = _mm256_add_ps(low, high);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  }
  static __m128 halves(const f* p) {  // 2 x 16 partial sums -> 2 x 2
    const __m128 a = quarters(p[0], p[1]);
    const __m128 b = quarters(p[2], p[3]);
    return _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  }
  static void totals(const f* p, float* out) {
    const __m128 a = halves(p);
    const __m128 b = halves(p + 4);
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(a, b, 0x88), _mm_shuffle_ps(a, b, 0xDD)));
  }
  using i = __m256i;
  static i zero_i() { return _mm256_setzero_si256(); }
  static i set1_i(std::int32_t x) { return _mm256_set1_epi32(x); }
  static i load_i(const std::int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_i(std::int32_t* p, i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static i count_greater(i count, i a, i b) { return _mm256_sub_epi32(count, _mm256_cmpgt_epi32(a, b)); }
};

#include "kernels_impl.inc"

}  // namespace

const KernelSet* avx2_kernels() {
  static const KernelSet set{"avx2", weighted_sum_any, dot_any, gather_any, touch, scores, top_k, count_larger};
  static const bool usable = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi");
  return usable ? &set : nullptr;
}

}  // namespace memlane

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace memlane {
const KernelSet* avx2_kernels() { return nullptr; }
}  // namespace memlane

#endif
