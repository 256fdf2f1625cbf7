// Element types on the device and loads of several elements at once. Kernels never spell float4.
#pragma once

#include <type_traits>

#include "gradsafe/types.h"
#include "launch.cuh"

namespace gradsafe {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct f8 { uint8_t bits; };

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

// The bits move into place and the exponent is rebased; the subnormals are multiples of 2^-9.
__device__ inline float widen(f8 x) {
  const uint32_t sign = uint32_t{x.bits & 0x80u} << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  const uint32_t normal = (magnitude << 20) + 0x3c000000u;
  const uint32_t subnormal = __float_as_uint(static_cast<float>(magnitude) * 0x1p-9f);
  const uint32_t number = magnitude < 8 ? subnormal : normal;
  return __uint_as_float(sign | (magnitude == 0x7fu ? 0x7fc00000u : number));
}

// Rounded to nearest, ties to even.
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}
template <>
__device__ inline f16 narrow<f16>(float x) {
#if defined(GRADSAFE_EMULATE)
  return {emulated_float_to_half(x)};
#else
  f16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
#endif
}

// N neighbouring elements. At 16 bytes and more the compiler emits 16-byte loads.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// Two neighbouring f8 (the first in the low byte) in float16; a NaN stays one.
__device__ inline uint32_t widen_two_f8(uint32_t bytes) {
  uint32_t halves;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
#else
  // The same bits in float16 are the number / 256; 480 / 256 stands for NaN.
  const uint32_t apart = (bytes & 0xffu) << 8 | (bytes & 0xff00u) << 16;
  halves = (apart & 0x80008000u) | (apart & 0x7f007f00u) >> 1;
#endif
  return halves;
}

// Element i in float32. Of bfloat16 and f8 taken from words: fewer instructions than one by one.
template <class T, int N>
__device__ inline float widen_at(const Pack<T, N>& pack, int i) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(&pack)[i / 2];
    return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, f8> && N % 4 == 0) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(&pack)[i / 4];
    const uint32_t halves = widen_two_f8(i % 4 < 2 ? word & 0xffffu : word >> 16);
    const float x = widen(f16{static_cast<uint16_t>(i % 2 == 0 ? halves & 0xffffu : halves >> 16)});
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return x;
#else
    return fabsf(x) == 1.875f ? __uint_as_float(0x7fc00000u) : x * 256.0f;
#endif
  } else {
    return widen(pack.v[i]);
  }
}

// Two numbers, rounded, as one word: the first in its low half.
template <class T>
__device__ inline uint32_t narrow_two(float low, float high) {
#if defined(GRADSAFE_EMULATE)
  return uint32_t{narrow<T>(low).bits} | uint32_t{narrow<T>(high).bits} << 16;
#else
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

// N numbers, from `first` on, rounded to their type.
template <class T, int N, int M>
__device__ inline Pack<T, N> narrow_pack(const float (&values)[M], int first = 0) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2) {
    static_assert(N % 2 == 0, "16-bit types are rounded in pairs");
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      reinterpret_cast<uint32_t*>(&pack)[i / 2] =
          narrow_two<T>(values[first + i], values[first + i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = narrow<T>(values[first + i]);
  }
  return pack;
}

constexpr int kVectorBytes = 16;

// Host: whether every row starts on a 16-byte border; `element` in bytes. The stride is not checked
// where there is only one row.
inline bool starts_aligned(const void* data, int64_t stride, int64_t element, int64_t rows = 2) {
  return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 &&
         (rows <= 1 || stride * element % kVectorBytes == 0);
}

// Elements per step so that the narrower of two types fills one 16-byte load; of bytes only eight,
// for the sake of registers.
constexpr int64_t pack_size(int64_t a, int64_t b) {
  const int64_t narrow = a < b ? a : b;
  return narrow < 2 ? 8 : kVectorBytes / narrow;
}
template <class A, class B>
constexpr int kPackSize = static_cast<int>(pack_size(sizeof(A), sizeof(B)));

// N neighbouring elements as they lie in memory. They are widened one by one when they are needed, so
// that a kernel can ask for several packs before it needs the first.
template <class T, int N>
struct RawPack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  using Chunk = std::conditional_t<kBytes == 8, uint2, uint4>;
  static_assert(kBytes == 8 || kBytes % kVectorBytes == 0, "a pack is whole words");
  static constexpr int kLoads = kBytes / static_cast<int>(sizeof(Chunk));
  using Part = Pack<T, N / kLoads>;
  Chunk chunks[kLoads];

  // kWhole: p is on a border of a chunk, and all N elements exist; else the first `left` do, and
  // zeros stand behind them. What is read is not needed again: it leaves the caches first.
  template <bool kWhole>
  __device__ void load(const T* p, int64_t left) {
#pragma unroll
    for (int c = 0; c < kLoads; ++c) {
      if constexpr (kWhole) {
        chunks[c] = __ldcs(reinterpret_cast<const Chunk*>(p) + c);
      } else {
        Part part = {};
#pragma unroll
        for (int i = 0; i < N / kLoads; ++i) {
          if (c * (N / kLoads) + i < left) part.v[i] = p[c * (N / kLoads) + i];
        }
        chunks[c] = reinterpret_cast<const Chunk&>(part);
      }
    }
  }

  __device__ float at(int i) const {
    return widen_at(reinterpret_cast<const Part&>(chunks[i / (N / kLoads)]), i % (N / kLoads));
  }
};

// Reads N elements as float32. What is read for the last time (kLast) leaves the caches first.
template <class T, int N, bool kLast = true>
__device__ inline void load_pack(const T* p, float (&out)[N]) {
  constexpr int kBytes = sizeof(T) * N;
  using Chunk = std::conditional_t<kBytes == 8, uint2, uint4>;
  constexpr int kWords = kBytes / static_cast<int>(sizeof(Chunk));
  static_assert(kBytes == 8 || kBytes % kVectorBytes == 0, "a pack is whole words");
  constexpr int kPerWord = N / kWords;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const Chunk* from = reinterpret_cast<const Chunk*>(p) + w;
    const Chunk word = kLast ? __ldcs(from) : __ldcg(from);
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
    const Pack<T, kPerWord> pack = narrow_pack<T, kPerWord>(values, w * kPerWord);
    __stcs(reinterpret_cast<uint4*>(p) + w, reinterpret_cast<const uint4&>(pack));
  }
}

// The first n of N elements, zeros behind them; for ragged ends and unaligned rows.
template <class T, int N>
__device__ inline void load_first(const T* p, int64_t n, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = i < n ? widen(p[i]) : 0.0f;
}

// ---- one 16-byte word, kept in its own type until it is needed ------------------------------------
template <class T>
constexpr int kWordSize = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Word = Pack<T, kWordSize<T>>;

// `left` elements lie before the end. kWhole: they fill the word, and p is on a 16-byte border.
// Default caching: whoever uses these reads the data twice, or writes what was read.
template <bool kWhole, class T>
__device__ inline Word<T> load_word(const T* p, int64_t left) {
  if constexpr (kWhole) {
    const uint4 bits = __ldca(reinterpret_cast<const uint4*>(p));
    return reinterpret_cast<const Word<T>&>(bits);
  } else {
    Word<T> word = {};
#pragma unroll
    for (int i = 0; i < kWordSize<T>; ++i) {
      if (i < left) word.v[i] = p[i];
    }
    return word;
  }
}

template <bool kWhole, class T>
__device__ inline void store_word(T* p, int64_t left, const Word<T>& word) {
  if constexpr (kWhole) {
    __stcg(reinterpret_cast<uint4*>(p), reinterpret_cast<const uint4&>(word));
  } else {
#pragma unroll
    for (int i = 0; i < kWordSize<T>; ++i) {
      if (i < left) p[i] = word.v[i];
    }
  }
}

}  // namespace gradsafe
