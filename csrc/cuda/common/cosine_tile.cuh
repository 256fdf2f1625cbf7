// Dot products of a tile of queries with a tile of rows, both stored by features.
//
// A block of eight warps holds kQueries x 128 sums, a warp a quarter of the rows and half of the
// queries in fragments of 16 x 8. A stage is 128 bytes of features of every vector. Where nothing
// needs scaling or widening, stages arrive by cp.async; else they pass through registers. Either way
// the products of an element are added in the same order, which does not depend on the tile.
//
// 16-bit operands of one type meet in the tensor cores as they are. Everything else becomes float32
// and is split into two parts of 11 bits each, x = big + small; of the four products of parts the
// three largest are added (3xTF32, the scheme of CUTLASS's example 27). What is lost is below 2^-22
// of each product.
//
// Tensor cores truncate their sums. So a stage is summed from zero, and stages are added by ordinary
// additions, which round to nearest.
#pragma once

#include "async_copy.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "tile_loads.cuh"

namespace gradsafe {

constexpr int kCosineThreads = 8 * kWarp;
constexpr int kCosineTileRows = 128;
constexpr int kStageWidth = 128;  // bytes of one vector in a stage

// Vectors of one operand; `scales` are powers of two.
struct CosineOperand {
  const void* data;
  int64_t stride;
  int64_t count;  // vectors that exist
  const float* scales;
  DType dtype;
  bool direct;  // stored in the tile's type, and every vector starts on a 16-byte border
};

// Where a lane's fragments lie in the tile: m over queries, n over rows, e within a fragment.
template <int kQueries>
struct CosinePlace {
  int warp_query, warp_row, g, t;

  __device__ CosinePlace() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    warp_query = warp / 4 * (kQueries / 2);
    warp_row = warp % 4 * (kCosineTileRows / 4);
    g = lane / 4;
    t = lane % 4;
  }
  __device__ int query(int m, int half) const { return warp_query + 16 * m + 8 * half + g; }
  __device__ int row(int n, int e) const { return warp_row + 8 * n + 2 * t + e; }
};

template <class T, int kQueries>
class CosineTile {
 public:
  static constexpr int kCount = kChunkBytes / sizeof(T);  // elements of a chunk
  static constexpr int kChunks = kStageWidth / kChunkBytes;
  static constexpr int kStep = kChunks * kCount;  // features of a stage
  static constexpr int kStageBytes = (kQueries + kCosineTileRows) * kStageWidth;
  static constexpr int kM = kQueries / 32, kN = kCosineTileRows / 32;
  using Sums = float[kM][kN][4];

  __device__ CosineTile(const CosineOperand& queries, const CosineOperand& rows,
                        int64_t first_query, int64_t first_row)
      : queries_(queries, first_query, kQueries), rows_(rows, first_row, kCosineTileRows) {
    bool scaled = false;
    for (int i = threadIdx.x % kWarp; i < queries_.count; i += kWarp) {
      scaled |= queries.scales[first_query + i] != 1.0f;
    }
    for (int i = threadIdx.x % kWarp; i < rows_.count; i += kWarp) {
      scaled |= rows.scales[first_row + i] != 1.0f;
    }
    direct_ = queries.direct && rows.direct && !__any_sync(kAllLanes, scaled);
  }

  // Starts to load a stage: the features from `first` on that lie before `end`, then zeros.
  __device__ void load(char* stage, int64_t first, int64_t end) const {
    char* const row_stage = stage + kQueries * kStageWidth;
    if (direct_) {
      queries_.template start<kQueries>(stage, first, end);
      rows_.template start<kCosineTileRows>(row_stage, first, end);
    } else {
      queries_.template copy<kQueries>(stage, first, end);
      rows_.template copy<kCosineTileRows>(row_stage, first, end);
    }
  }

  // Adds the products of a stage.
  __device__ static void multiply(Sums& sums, const char* stage) {
    const CosinePlace<kQueries> place;
    const int row = threadIdx.x % 8, quarter = threadIdx.x % kWarp / 8;
    const char* query_at = stage + (place.warp_query + quarter % 2 * 8 + row) * kStageWidth;
    const char* row_at =
        stage + (kQueries + place.warp_row + quarter / 2 * 8 + row) * kStageWidth;
    Sums fresh = {};
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {  // 16 features, or 8 of float32
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int chunk = (k + quarter / 2) ^ row;
        ldmatrix(a[m], query_at + 16 * m * kStageWidth + chunk * kChunkBytes);
      }
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        const int chunk = (k + quarter % 2) ^ row;
        ldmatrix(b[n], row_at + 16 * n * kStageWidth + chunk * kChunkBytes);
      }
      multiply_fragments(fresh, a, b);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] += fresh[m][n][e];
      }
    }
  }

 private:
  static constexpr int kVectorStep = kCosineThreads / kChunks;

  // One operand's vectors of the tile. A thread moves the same chunk of every 32nd vector; chunk c
  // of vector v lies at place c ^ v % 8, so that eight neighbours fill all banks.
  struct Side {
    const CosineOperand& from;
    int64_t first;
    int count;  // vectors of the tile that exist

    __device__ Side(const CosineOperand& from_, int64_t first_, int most)
        : from(from_), first(first_), count(clamp_count(from_.count, first_, most)) {}

    __device__ static int shared_place(int vector) {
      const int chunk = threadIdx.x % kChunks;
      return vector * kStageWidth + (chunk ^ (vector % 8)) * kChunkBytes;
    }

    template <int kVectors>
    __device__ void start(char* stage, int64_t feature, int64_t end) const {
      const int64_t at = feature + threadIdx.x % kChunks * kCount;
      const int valid = clamp_count(end, at, kCount) * static_cast<int>(sizeof(T));
      // As integers: addresses of what is not there are computed, too, though never read.
      const uint64_t data = reinterpret_cast<uint64_t>(from.data);
      const int vector = threadIdx.x / kChunks;
      uint64_t source = data + ((first + vector) * from.stride + at) * sizeof(T);
      const uint64_t step = kVectorStep * from.stride * sizeof(T);
      char* to = stage + shared_place(vector);
      if (count >= kVectors && valid == kChunkBytes) {  // the usual case saves many instructions
#pragma unroll
        for (int i = 0; i < kVectors / kVectorStep; ++i, source += step) {
          cp_async16(to + i * (kVectorStep * kStageWidth), reinterpret_cast<const void*>(source));
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < kVectors / kVectorStep; ++i, source += step) {
          const bool exists = vector + i * kVectorStep < count && valid > 0;
          cp_async16(to + i * (kVectorStep * kStageWidth),
                     reinterpret_cast<const void*>(exists ? source : data), exists ? valid : 0);
        }
      }
    }

    template <int kVectors>
    __device__ void copy(char* stage, int64_t feature, int64_t end) const {
      const int64_t at = feature + threadIdx.x % kChunks * kCount;
#pragma unroll 1
      for (int vector = threadIdx.x / kChunks; vector < kVectors; vector += kVectorStep) {
        const int valid = vector < count ? clamp_count(end, at, kCount) : 0;
        Pack<T, kCount> chunk = {};
        if (valid > 0) {
          const float scale = from.scales[first + vector];
          const int64_t place = (first + vector) * from.stride + at;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            if (i < valid) chunk.v[i] = read(place + i, scale);
          }
        }
        *reinterpret_cast<Pack<T, kCount>*>(stage + shared_place(vector)) = chunk;
      }
    }

    __device__ T read(int64_t place, float scale) const {
      if constexpr (std::is_same<T, float>::value) {
        switch (from.dtype) {
          case DType::f32: return static_cast<const float*>(from.data)[place] * scale;
          case DType::bf16: return widen(static_cast<const bf16*>(from.data)[place]) * scale;
          default: return widen(static_cast<const f16*>(from.data)[place]) * scale;
        }
      } else if constexpr (std::is_same<T, bf16>::value) {
        // A power of two keeps the bits of the mantissa, so cutting is exact.
        const float value = widen(static_cast<const bf16*>(from.data)[place]) * scale;
        return {static_cast<uint16_t>(__float_as_uint(value) >> 16)};
      } else {
        return static_cast<const f16*>(from.data)[place];  // never so large or small to be scaled
      }
    }
  };

  // x = big + small; the tensor core ignores the lower 13 bits of both. Rounded, not cut: cutting
  // would shorten every vector.
  __device__ static void split(uint32_t bits, uint32_t& big, uint32_t& small) {
    constexpr uint32_t kHalf = 0x1000u, kIgnored = 0x1fffu;
    big = (bits + kHalf) & ~kIgnored;
    small = __float_as_uint(__uint_as_float(bits) - __uint_as_float(big)) + kHalf;
  }

  // Fragments of two 8-row blocks arrive in one b: halves 0, 1 of the first, then of the second.
  __device__ static void multiply_fragments(Sums& sums, uint32_t (&a)[kM][4],
                                            uint32_t (&b)[kN / 2][4]) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k16<T>(sums[m][n], a[m], half);
      }
    } else {
      uint32_t a_small[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) split(a[m][i], a[m][i], a_small[m][i]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t big[2], small[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) split(b[n / 2][n % 2 * 2 + i], big[i], small[i]);
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k8_tf32(sums[m][n], a_small[m], big);
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k8_tf32(sums[m][n], a[m], small);
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k8_tf32(sums[m][n], a[m], big);
      }
    }
  }

  Side queries_, rows_;
  bool direct_;
};

}  // namespace gradsafe
