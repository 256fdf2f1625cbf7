// Vectors read once, straight from memory: their norms, and their products with a few queries.
//
// A warp takes four vectors at a time, so that at least four 16-byte loads of every lane are in
// flight. Sums are float32 over at most 256 products of a lane, then over the warp, then float64.
#pragma once

#include "../../common/cosine_scale.h"
#include "../../common/topk_key.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace gradsafe {

constexpr int kRowsAtOnce = 4;
constexpr int kLanesOfRow = kWarp / kRowsAtOnce;  // that end up with the sums of one vector
constexpr int kChain = 256;                       // products of a float32 chain

// Packed queries: float32, scaled, zeros up to a multiple of kPackedStep; the order within 32 * N
// features is [N / 4][lane][4] for vectors with N elements in 16 bytes.
constexpr int kPackedStep = kWarp * 8;
template <class T>
__device__ inline int64_t packed_place(int64_t feature) {
  constexpr int N = kWordSize<T>;
  const int64_t lane = feature / N % kWarp, i = feature % N;
  return feature / (kWarp * N) * (kWarp * N) + (i / 4 * kWarp + lane) * 4 + i % 4;
}

// What lane l knows about vector l / 8 (and query l % 8).
struct RowResult {
  double dot;      // with the packed query, of the scaled vector
  double inverse;  // 1 / norm of the scaled vector, 0 for a zero vector, NaN for a damaged one
  float scale;     // a power of two
};

// Sums of squares in this range can have lost nothing to overflow or underflow.
__device__ inline bool is_safe_square(double sum) { return sum >= 0x1p-60 && sum <= 0x1p80; }

template <class T, int kQueries>  // 0, 1 or 8 queries
class RowProducts {
 public:
  // `count` vectors (at least 1) follow `data`; those behind them repeat the last.
  __device__ RowProducts(const T* data, int64_t stride, int count, int64_t features, bool aligned,
                         const float* packed, int64_t packed_stride)
      : features_(features), packed_(packed), packed_stride_(packed_stride) {
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) rows_[r] = data + min(r, count - 1) * stride;
    if (aligned) add<true>();
    // The careful way, at most twice: where vectors start anywhere, and where sums may have lost
    // something, then with scales.
#pragma unroll 1
    for (bool summed = aligned; !summed || (!scaled_ && must_scale()); summed = true) add<false>();
  }

  __device__ RowResult result() const {
    RowResult result{dot_, 0, scales_[0]};
    const int row = threadIdx.x % kWarp / kLanesOfRow;
#pragma unroll
    for (int r = 1; r < kRowsAtOnce; ++r) {
      if (row == r) result.scale = scales_[r];
    }
    if (squares_ > 0) result.inverse = 1 / sqrt(squares_);
    if (!finite_) result.inverse = double{__uint_as_float(kNanBits)};
    return result;
  }

 private:
  static constexpr int N = kWordSize<T>;
  static constexpr int kStep = kWarp * N;           // features of one load of a warp
  static constexpr int kFold = kStep * kChain / N;  // features of a chain
  static constexpr int kDots = kQueries == 0 ? kRowsAtOnce : kRowsAtOnce * kQueries;
  static constexpr int kUnroll = kQueries > 1 ? 1 : 2;

  struct Chains {
    float dots[kDots];
    float squares[kRowsAtOnce];
  };

  // Whether sums may have lost something; if so, sets scales for another try.
  __device__ bool must_scale() {
    const bool safe = is_safe_square(squares_);
    if (__all_sync(kAllLanes, safe)) return false;
    scaled_ = true;
    unsigned largest[kRowsAtOnce] = {};
#pragma unroll 1
    for (int64_t d = threadIdx.x % kWarp; d < features_; d += kWarp) {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        largest[r] = max(largest[r], __float_as_uint(widen(rows_[r][d])) & 0x7fffffffu);
      }
    }
    const int own = threadIdx.x % kWarp / kLanesOfRow;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        largest[r] = max(largest[r], __shfl_xor_sync(kAllLanes, largest[r], mask));
      }
      const bool safe_row = __shfl_sync(kAllLanes, safe ? 1 : 0, r * kLanesOfRow) != 0;
      const bool finite = is_finite_magnitude(largest[r]);
      const bool scale = !safe_row && finite && largest[r] != 0;
      if (own == r) finite_ = finite;
      scales_[r] = scale ? __uint_as_float(cosine_scale_bits(largest[r])) : 1.0f;
    }
    return true;
  }

  // Sums of all features; unless kFast, element by element and scaled.
  template <bool kFast>
  __device__ void add() {
    dot_ = squares_ = 0;
#pragma unroll 1
    for (int64_t fold = 0; fold < features_; fold += kFold) {
      const int64_t end = min(fold + kFold, features_);
      Chains chains = {};
      int64_t d = fold;
      if constexpr (kFast) {
#pragma unroll 1
        for (; d + kUnroll * kStep <= end; d += kUnroll * kStep) {
          add_steps<true, false, kUnroll>(chains, d, end);
        }
      }
#pragma unroll 1
      for (; d < end; d += kStep) add_steps<false, !kFast, 1>(chains, d, end);
      if constexpr (kQueries > 0) dot_ += double{warp_sum_many(chains.dots)};
      squares_ += double{warp_sum_many(chains.squares)};
    }
  }

  template <bool kWhole, bool kScaled, int kSteps>
  __device__ void add_steps(Chains& chains, int64_t step, int64_t end) const {
    const int lane = threadIdx.x % kWarp;
    Word<T> words[kSteps][kRowsAtOnce];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t d = step + s * kStep + lane * N;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        words[s][r] = stream_word<kWhole>(rows_[r] + d, end - d);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int half = 0; half < N / 4; ++half) {
        float values[kRowsAtOnce][4];
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            values[r][i] = widen(words[s][r].v[4 * half + i]);
            if constexpr (kScaled) values[r][i] *= scales_[r];
            chains.squares[r] = fmaf(values[r][i], values[r][i], chains.squares[r]);
          }
        }
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const float* from =
              packed_ + q * packed_stride_ + step + s * kStep + (half * kWarp + lane) * 4;
          const float4 query = *reinterpret_cast<const float4*>(from);
#pragma unroll
          for (int r = 0; r < kRowsAtOnce; ++r) {
            float& chain = chains.dots[r * kQueries + q];
            chain = fmaf(values[r][0], query.x, chain);
            chain = fmaf(values[r][1], query.y, chain);
            chain = fmaf(values[r][2], query.z, chain);
            chain = fmaf(values[r][3], query.w, chain);
          }
        }
      }
    }
  }

  // A word that this kernel reads once.
  template <bool kWhole>
  __device__ static Word<T> stream_word(const T* p, int64_t left) {
    if constexpr (kWhole) {
      const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
      return reinterpret_cast<const Word<T>&>(bits);
    } else {
      return load_word<false>(p, left);
    }
  }

  const T* rows_[kRowsAtOnce];
  float scales_[kRowsAtOnce] = {1, 1, 1, 1};
  int64_t features_;
  const float* packed_;
  int64_t packed_stride_;
  double dot_ = 0, squares_ = 0;
  bool scaled_ = false, finite_ = true;
};

}  // namespace gradsafe
