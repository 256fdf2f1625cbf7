// Sixteen float32 lanes in one AVX-512 register. Every level has the same sixteen virtual lanes and
// the same order of sums, so that results are equal bit by bit between AVX2 and AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gradsafe {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;  // 6 x 4 accumulators of the 32 registers

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct f8 { uint8_t bits; };

struct Vec {
  __m512 v;
};

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// b where a is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// `mask` is all ones, or all ones but the sign bit.
inline Vec bit_and(Vec a, uint32_t mask) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int>(mask))))};
}

inline Vec widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

// e4m3 shifted into place is a half whose exponent is short by eight; a product with 2^8 is exact.
inline Vec widen_f8(__m128i bytes) {
  const __m256i bits = _mm256_cvtepu8_epi16(bytes);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_andnot_si256(_mm256_set1_epi16(0x7f), bits), 8);
  const __m256i half = _mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign);
  const __mmask16 no_number = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_or_si256(half, _mm256_set1_epi16(0x7e00));
  const __m256i all = _mm256_mask_mov_epi16(half, no_number, nan);
  return {_mm512_mul_ps(_mm512_cvtph_ps(all), _mm512_set1_ps(256.0f))};
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const f8* p) {
  return widen_f8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const bf16* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// The first n of sixteen elements, zeros behind them; never touches memory past n.
inline Vec load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p)};
}
inline Vec load_first(const bf16* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p));
}
inline Vec load_first(const f16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), p))};
}

inline Vec load_first(const f8* p, int n) {
  return widen_f8(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p));
}

// `value` in the lanes from the n-th on.
inline Vec pad(Vec a, int n, float value) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(value), static_cast<__mmask16>((1u << n) - 1u), a.v)};
}

// value, but 0 where a < b, and where a is 0; NaN is neither.
inline Vec zero_if_less(Vec a, Vec b, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), value.v)};
}
inline Vec zero_if_zero(Vec a, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), value.v)};
}

// a * 2^n, where n are the low bits of `integer`.
inline Vec add_to_exponent(Vec a, Vec integer) {
  const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(integer.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), n))};
}

inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Rounded to nearest, ties to even; every NaN becomes the one that PyTorch stores.
inline __m256i narrow_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}
inline __m256i narrow_f16(Vec a) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(a));
}

// The first n of sixteen elements; never touches memory past n.
inline void store_first(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), a.v);
}
inline void store_first(bf16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), narrow_bf16(a));
}
inline void store_first(f16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), narrow_f16(a));
}

inline __m512d low(Vec a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)); }
inline __m512d high(Vec a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)); }

// p[0..15] += a, in float64.
inline void add_to(double* p, Vec a) {
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low(a)));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high(a)));
}

// Sum of the lanes in float64: lane i + lane i+8, then i+4, i+2, i+1.
inline double sum(Vec a) {
  const __m512d s8 = _mm512_add_pd(low(a), high(a));
  const __m256d s4 = _mm256_add_pd(_mm512_castpd512_pd256(s8), _mm512_extractf64x4_pd(s8, 1));
  const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
}

// To L2: the rows ahead would push the column accumulators out of L1.
inline void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

}  // namespace
}  // namespace gradsafe
