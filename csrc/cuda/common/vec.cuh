// Element types on the device and loads of several elements at once. Kernels never spell float4.
#pragma once

#include "gradsafe/types.h"
#include "launch.cuh"

namespace gradsafe {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ inline float widen(f16 x) {
#if defined(GRADSAFE_EMULATE)
  return emulated_half_to_float(x.bits);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#endif
}

// Rounded to nearest, ties to even.
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, bf16& out) {
#if defined(GRADSAFE_EMULATE)
  const unsigned bits = __float_as_uint(x);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#endif
}
__device__ inline void narrow(float x, f16& out) {
#if defined(GRADSAFE_EMULATE)
  out.bits = emulated_float_to_half(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#endif
}

// N neighbouring elements. At 16 bytes and more the compiler emits 16-byte loads.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

constexpr int kVectorBytes = 16;

// Elements per step so that the narrower of two types fills one 16-byte load.
template <class A, class B>
constexpr int kPackSize = kVectorBytes / (sizeof(A) < sizeof(B) ? sizeof(A) : sizeof(B));

// Reads N elements as float32. What is read for the last time (kLast) leaves the caches first.
template <class T, int N, bool kLast = true>
__device__ inline void load_pack(const T* p, float (&out)[N]) {
  constexpr int kWords = sizeof(T) * N / kVectorBytes;
  static_assert(kWords >= 1 && sizeof(T) * N % kVectorBytes == 0, "a pack is whole 16-byte words");
  constexpr int kPerWord = N / kWords;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint4* from = reinterpret_cast<const uint4*>(p) + w;
    const uint4 word = kLast ? __ldcs(from) : __ldcg(from);
    const Pack<T, kPerWord>& pack = reinterpret_cast<const Pack<T, kPerWord>&>(word);
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) out[w * kPerWord + i] = widen(pack.v[i]);
  }
}

// Writes N elements, rounded to their type; they are not read again soon.
template <class T, int N>
__device__ inline void store_pack(T* p, const float (&values)[N]) {
  constexpr int kWords = sizeof(T) * N / kVectorBytes;
  static_assert(kWords >= 1 && sizeof(T) * N % kVectorBytes == 0, "a pack is whole 16-byte words");
  constexpr int kPerWord = N / kWords;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint4 word;
    Pack<T, kPerWord>& pack = reinterpret_cast<Pack<T, kPerWord>&>(word);
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) narrow(values[w * kPerWord + i], pack.v[i]);
    __stcs(reinterpret_cast<uint4*>(p) + w, word);
  }
}

// The first n of N elements, zeros behind them; for ragged ends and unaligned rows.
template <class T, int N>
__device__ inline void load_first(const T* p, int64_t n, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = i < n ? widen(p[i]) : 0.0f;
}

}  // namespace gradsafe
