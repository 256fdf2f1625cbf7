// Sums within a warp and a block, always in the same order.
#pragma once

#include "launch.cuh"

namespace gradsafe {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, mask);
  }
  return value;
}

namespace detail {

// One halving step per level of recursion: with loops the compiler may keep v in local memory.
template <int kHalf, int kMask, int kLast, int M>
__device__ inline void halve(float (&v)[M], int lane) {
  if constexpr (kMask < kLast) {
    return;
  } else if constexpr (kHalf >= 1) {
    const bool upper = (lane & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float send = upper ? v[i] : v[i + kHalf];
      const float keep = upper ? v[i + kHalf] : v[i];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, kMask);
    }
    halve<kHalf / 2, kMask / 2, kLast>(v, lane);
  } else {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], kMask);
    halve<0, kMask / 2, kLast>(v, lane);
  }
}

}  // namespace detail

// Sums M values (a power of two) over the warp with about M + log2(32 / M) shuffles instead of
// 5 M: each step halves the values a lane still carries. Afterwards lane i holds the sum of value
// i / (32 / M).
template <int M>
__device__ inline float warp_sum_many(float (&v)[M]) {
  static_assert(M >= 1 && M <= kWarp && (M & (M - 1)) == 0, "M is a power of two up to 32");
  detail::halve<M / 2, kWarp / 2, 1>(v, static_cast<int>(threadIdx.x % kWarp));
  return v[0];
}

// The same over groups of kLanes lanes, kStride lanes apart, for M >= kLanes values. The lane at
// place p = lane / kStride % kLanes of its group holds in v[i] the sum of value p * M / kLanes + i
// for i < M / kLanes; the rest of v is spent.
template <int kLanes, int kStride, int M>
__device__ inline void group_sum_many(float (&v)[M]) {
  static_assert(M >= kLanes && (M & (M - 1)) == 0, "M is a power of two, and at least kLanes");
  static_assert(kLanes * kStride <= kWarp, "a group lies within a warp");
  detail::halve<M / 2, kLanes * kStride / 2, kStride>(v, static_cast<int>(threadIdx.x % kWarp));
}

// Block-wide float64 sums of Q values per thread; `out[q]` is written by thread q. `shared` holds
// Q * (threads / 32) doubles.
template <int Q>
__device__ inline void block_sum_to(const double (&value)[Q], double* shared, double* out) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const double total = warp_sum(value[q]);
    if (lane == 0) shared[warp * Q + q] = total;
  }
  __syncthreads();
  if (threadIdx.x < Q) {
    double total = 0;
    for (int w = 0; w < warps; ++w) total += shared[w * Q + threadIdx.x];
    out[threadIdx.x] = total;
  }
}

}  // namespace gradsafe
