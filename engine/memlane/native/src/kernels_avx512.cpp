// Kernels for AVX-512 F, BW, DQ and VL (x86-64-v4).
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "order.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi"))), \
                             apply_to = function)
#else
// GCC 12's own intrinsics start from a deliberately undefined register and then warn about it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,prefer-vector-width=512")
#endif

namespace memlane {
namespace {

struct V {
  static constexpr int L = 16;
  using f = __m512;
  using codes = __m512i;
  static f zero() { return _mm512_setzero_ps(); }
  static f set1(float x) { return _mm512_set1_ps(x); }
  static f load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, f x) { _mm512_storeu_ps(p, x); }
  static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
  static f max(f a, f b) { return _mm512_max_ps(a, b); }
  static std::uint32_t not_less(f a, f b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static __m256i load_32(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m128i load_16(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static f load_f32(const std::uint8_t* p) { return _mm512_loadu_ps(p); }
  static f load_bf16(const std::uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_32(p)), 16));
  }
  static f load_f16(const std::uint8_t* p) { return _mm512_cvtph_ps(load_32(p)); }
  static f load_e4m3(const std::uint8_t* p) {  // sign-extended, so that the shift brings the sign to bits 15 and 14
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_16(p)), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xBF80))));
  }
  static f load_i8(const std::uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(p))); }
  static codes load_codes(const std::uint8_t* p) { return _mm512_cvtepu8_epi32(load_16(p)); }
  static f nibbles(__m512i c) {  // a table of 16 floats, which looks at the low four bits of each lane alone
    return _mm512_permutexvar_ps(c, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
  }
  static f low_nibbles(codes c) { return nibbles(c); }
  static f high_nibbles(codes c) { return nibbles(_mm512_srli_epi32(c, 4)); }
  static void totals(const f* p, float* out) {
    const f a = _mm512_add_ps(_mm512_shuffle_f32x4(p[0], p[1], 0x44), _mm512_shuffle_f32x4(p[0], p[1], 0xEE));
    const f b = _mm512_add_ps(_mm512_shuffle_f32x4(p[2], p[3], 0x44), _mm512_shuffle_f32x4(p[2], p[3], 0xEE));
    const f four = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    const f two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4E));
    const f one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xB1));  // the total of each in a quarter of its own
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, one)));
  }
  using i = __m512i;
  static i zero_i() { return _mm512_setzero_si512(); }
  static i set1_i(std::int32_t x) { return _mm512_set1_epi32(x); }
  static i load_i(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_i(std::int32_t* p, i x) { _mm512_storeu_si512(p, x); }
  static i count_greater(i count, i a, i b) {
    return _mm512_mask_add_epi32(count, _mm512_cmpgt_epi32_mask(a, b), count, _mm512_set1_epi32(1));
  }
};

#include "kernels_impl.inc"

}  // namespace

const KernelSet* avx512_kernels() {
  static const KernelSet set{"avx512", weighted_sum_any, dot_any, gather_any, touch, scores, top_k, count_larger};
  static const bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             avx2_kernels() != nullptr;
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
const KernelSet* avx512_kernels() { return nullptr; }
}  // namespace memlane

#endif
