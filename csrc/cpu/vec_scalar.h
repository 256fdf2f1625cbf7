// Sixteen float32 lanes in the vector type of GCC and Clang, for machines without AVX2 and as the
// readable definition of the two others. Multiply and add are rounded separately: without hardware,
// fma is very slow.
#pragma once

#include <cstdint>
#include <cstring>

namespace gradsafe {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelVectors = 1;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct f8 { uint8_t bits; };

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
struct Vec {
  Lanes v;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float widen(f16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or NaN with its payload
    return from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  }
  // Shifted into place the exponent is short by 112; a product with 2^112 mends it and normalises
  // subnormals on the way, exactly.
  return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000u)));
}

// The eight significant bits move into place and the exponent is rebased; the seven subnormals are
// multiples of 2^-9. Nothing here depends on whether the processor flushes float32 subnormals.
inline float widen(f8 x) {
  const uint32_t sign = uint32_t{x.bits & 0x80u} << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return from_bits(sign | 0x7fc00000u);
  if (magnitude < 8) {
    return from_bits(sign | to_bits(static_cast<float>(magnitude) * from_bits(0x3b000000u)));
  }
  return from_bits(sign | ((magnitude << 20) + 0x3c000000u));
}

// Rounded to nearest, ties to even; every NaN becomes the one that PyTorch stores.
inline void narrow(float x, float& out) { out = x; }
inline void narrow(float x, bf16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}
inline void narrow(float x, f16& out) {
  const uint32_t bits = to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // from 65520 on
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Beside 0.5 the unit of float32 is the smallest subnormal of float16: the sum rounds.
    result = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | result);
}

inline Vec broadcast(float x) { return {Lanes{} + x}; }
inline Vec zero() { return {Lanes{}}; }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec root(Vec a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
inline Vec fma(Vec a, Vec b, Vec c) { return {c.v + a.v * b.v}; }
// b where a is NaN.
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec bit_and(Vec a, uint32_t mask) {
  return {reinterpret_cast<Lanes>(reinterpret_cast<Bits>(a.v) & mask)};
}

template <class T>
inline Vec load_first(const T* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = widen(p[i]);
  return a;
}
template <class T>
inline Vec load(const T* p) {
  Vec a;
  for (int i = 0; i < kLanes; ++i) a.v[i] = widen(p[i]);
  return a;
}

// `value` in the lanes from the n-th on.
inline Vec pad(Vec a, int n, float value) {
  for (int i = n; i < kLanes; ++i) a.v[i] = value;
  return a;
}

// value, but 0 where a < b, and where a is 0; NaN is neither.
inline Vec zero_if_less(Vec a, Vec b, Vec value) {
  for (int i = 0; i < kLanes; ++i) value.v[i] = a.v[i] < b.v[i] ? 0.0f : value.v[i];
  return value;
}
inline Vec zero_if_zero(Vec a, Vec value) {
  for (int i = 0; i < kLanes; ++i) value.v[i] = a.v[i] == 0.0f ? 0.0f : value.v[i];
  return value;
}

// a * 2^n, where n are the low bits of `integer`.
inline Vec add_to_exponent(Vec a, Vec integer) {
  for (int i = 0; i < kLanes; ++i) {
    a.v[i] = from_bits(to_bits(a.v[i]) + (to_bits(integer.v[i]) << 23));
  }
  return a;
}

inline float largest(Vec a) {
  float most = a.v[0];
  for (int i = 1; i < kLanes; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}

template <class T>
inline void store_first(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) narrow(a.v[i], p[i]);
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) narrow(a.v[i], p[i]);
}

inline void add_to(double* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] += a.v[i];
}

inline double sum(Vec a) {
  double s[kLanes];
  for (int i = 0; i < kLanes; ++i) s[i] = a.v[i];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  }
  return s[0];
}

inline void prefetch(const void*) {}

}  // namespace
}  // namespace gradsafe
