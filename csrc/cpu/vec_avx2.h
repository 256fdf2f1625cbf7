// Sixteen float32 lanes in two AVX2 registers; see vec_avx512.h for the order of sums.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gradsafe {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelVectors = 1;  // 6 x 1 accumulators are 12 of the 16 registers

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct f8 { uint8_t bits; };

struct Vec {
  __m256 lo, hi;
};

inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// b where a is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

inline Vec bit_and(Vec a, uint32_t mask) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(mask)));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}

inline __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
inline Vec load(const f16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}

// e4m3 shifted into place is a half whose exponent is short by eight; a product with 2^8 is exact.
inline Vec load(const f8* p) {
  const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), bits), 8);
  const __m256i no_number = _mm256_and_si256(
      _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
  const __m256i half =
      _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), no_number);
  const __m256 rebase = _mm256_set1_ps(256.0f);
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), rebase),
          _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), rebase)};
}

template <class T>
inline Vec load_first(const T* p, int n) {
  T padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

// `value` in the lanes from the n-th on.
inline Vec pad(Vec a, int n, float value) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes);
  const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes);
  const __m256 other = _mm256_set1_ps(value);
  return {_mm256_blendv_ps(other, a.lo, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(other, a.hi, _mm256_castsi256_ps(high))};
}

// value, but 0 where a < b, and where a is 0; NaN is neither.
inline Vec zero_if_less(Vec a, Vec b, Vec value) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ), value.hi)};
}
inline Vec zero_if_zero(Vec a, Vec value) {
  const __m256 none = _mm256_setzero_ps();
  return {_mm256_and_ps(_mm256_cmp_ps(a.lo, none, _CMP_NEQ_UQ), value.lo),
          _mm256_and_ps(_mm256_cmp_ps(a.hi, none, _CMP_NEQ_UQ), value.hi)};
}

// a * 2^n, where n are the low bits of `integer`.
inline __m256 add_to_exponent(__m256 a, __m256 integer) {
  const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(integer), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), n));
}
inline Vec add_to_exponent(Vec a, Vec integer) {
  return {add_to_exponent(a.lo, integer.lo), add_to_exponent(a.hi, integer.hi)};
}

inline float largest(Vec a) {
  const __m256 m8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_shuffle_ps(m2, m2, 1)));
}

inline void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}

// Rounded to nearest, ties to even, in the low halves of 32-bit lanes; every NaN becomes the one
// that PyTorch stores.
inline __m256i narrow_bf16(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store(bf16* p, Vec a) {
  // The pack works within 128-bit halves; the permutation puts the quarters in order.
  const __m256i mixed = _mm256_packus_epi32(narrow_bf16(a.lo), narrow_bf16(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(mixed, 0xd8));
}
inline void store(f16* p, Vec a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, kNearest));
}

template <class T>
inline void store_first(T* p, Vec a, int n) {
  T padded[kLanes];
  store(padded, a);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

// Quarters of the sixteen lanes as float64: lanes 0-3, 4-7, 8-11, 12-15.
inline __m256d quarter(Vec a, int which) {
  const __m256 half = which < 2 ? a.lo : a.hi;
  return _mm256_cvtps_pd(which % 2 ? _mm256_extractf128_ps(half, 1) : _mm256_castps256_ps128(half));
}

inline void add_to(double* p, Vec a) {
  for (int q = 0; q < 4; ++q) {
    _mm256_storeu_pd(p + 4 * q, _mm256_add_pd(_mm256_loadu_pd(p + 4 * q), quarter(a, q)));
  }
}

inline double sum(Vec a) {
  const __m256d s8_low = _mm256_add_pd(quarter(a, 0), quarter(a, 2));   // lanes 0-3 of s8
  const __m256d s8_high = _mm256_add_pd(quarter(a, 1), quarter(a, 3));  // lanes 4-7 of s8
  const __m256d s4 = _mm256_add_pd(s8_low, s8_high);
  const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
}

// To L2: the rows ahead would push the column accumulators out of L1.
inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace gradsafe
