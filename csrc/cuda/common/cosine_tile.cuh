// Dot products of a tile of queries with a tile of rows, both stored by features.
//
// A block of four warps loads 64 queries and 64 rows, a stage of features at a time, through
// registers (where rows are widened and scaled) into one of two shared buffers. Fragments lie as in
// TilePlace: m over queries, n over rows. Two 16-bit operands of one type meet in the tensor cores;
// everything else becomes float32 and meets in plain fused multiply-adds, because TF32 would round
// it to 11 bits.
#pragma once

#include "tile_product.cuh"

namespace gradsafe {

constexpr int kCosineTile = 64;

// Vectors of one operand; `scales` are powers of two.
struct CosineOperand {
  const void* data;
  int64_t stride;
  int64_t count;  // vectors that exist
  const float* scales;
  DType dtype;
  bool aligned;  // every vector starts on a border of kChunkBytes of the stored type
};

// One chunk of 16 bytes of type T from `valid` elements of type S at `from`, zeros behind them.
template <class T, class S>
__device__ inline Pack<T, kChunkBytes / sizeof(T)> read_chunk(const S* from, int valid, bool aligned,
                                                              float scale) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  Pack<S, kCount> in;
  if (aligned && valid == kCount) {
    in = *reinterpret_cast<const Pack<S, kCount>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) in.v[i] = i < valid ? from[i] : S{};
  }
  Pack<T, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same<T, float>::value) {
      out.v[i] = widen(in.v[i]) * scale;
    } else if constexpr (std::is_same<T, bf16>::value) {
      // A power of two keeps the bits of the mantissa, so cutting is exact.
      out.v[i].bits = static_cast<uint16_t>(__float_as_uint(widen(in.v[i]) * scale) >> 16);
    } else {
      out.v[i] = in.v[i];  // f16 is never so large or small that it is scaled
    }
  }
  return out;
}

template <class T>
struct CosineTile {
  static constexpr int kCount = kChunkBytes / sizeof(T);  // elements of a chunk
  static constexpr int kChunks = 4;                       // of a vector in a stage
  static constexpr int kStep = kChunks * kCount;          // features of a stage
  static constexpr int kVectorBytesInStage = kChunks * kChunkBytes;
  static constexpr int kStageBytes = 2 * kCosineTile * kVectorBytesInStage;
  static constexpr int kLoads = 2 * kCosineTile * kChunks / kTileThreads;  // chunks of a thread
  static constexpr int kM = TilePlace<kCosineTile, kCosineTile>::kM;
  static constexpr int kN = TilePlace<kCosineTile, kCosineTile>::kN;
  using Chunk = Pack<T, kCount>;
  using Sums = float[kM][kN][4];

  // Chunk c of a vector lies at place c ^ mix(vector): eight neighbours then fill all banks.
  __device__ static int place_of(int vector, int chunk) {
    return vector * kVectorBytesInStage + (chunk ^ (vector / 2 % kChunks)) * kChunkBytes;
  }

  // A thread's chunks: number threadIdx.x % 4 of every 32nd vector, queries first.
  const void* data[kLoads];
  float scale[kLoads];
  DType dtype[2];
  bool aligned[2];
  int64_t features;

  __device__ CosineTile(const CosineOperand& queries, const CosineOperand& rows, int64_t first_query,
                        int64_t first_row, int64_t features_)
      : dtype{queries.dtype, rows.dtype},
        aligned{queries.aligned, rows.aligned},
        features(features_) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const CosineOperand& from = i < kLoads / 2 ? queries : rows;
      const int64_t first = i < kLoads / 2 ? first_query : first_row;
      const int64_t vector = first + vector_of(i) % kCosineTile;
      const bool exists = vector < from.count;
      const int64_t bytes = vector * from.stride * (from.dtype == DType::f32 ? 4 : 2);
      data[i] = exists ? static_cast<const char*>(from.data) + bytes : nullptr;
      scale[i] = exists ? from.scales[vector] : 0.0f;
    }
  }

  __device__ static int vector_of(int i) {
    return threadIdx.x / kChunks + i * (kTileThreads / kChunks);
  }

  __device__ Chunk load_one(int i, int64_t feature) const {
    const int64_t at = feature + threadIdx.x % kChunks * kCount;
    const int valid = data[i] == nullptr ? 0 : clamp_count(features, at, kCount);
    if (valid == 0) return {};
    const int operand = i < kLoads / 2 ? 0 : 1;
    if constexpr (!std::is_same<T, float>::value) {
      return read_chunk<T>(static_cast<const T*>(data[i]) + at, valid, aligned[operand], scale[i]);
    } else {
      switch (dtype[operand]) {
        case DType::f32:
          return read_chunk<T>(static_cast<const float*>(data[i]) + at, valid, aligned[operand],
                               scale[i]);
        case DType::bf16:
          return read_chunk<T>(static_cast<const bf16*>(data[i]) + at, valid, aligned[operand],
                               scale[i]);
        default:
          return read_chunk<T>(static_cast<const f16*>(data[i]) + at, valid, aligned[operand],
                               scale[i]);
      }
    }
  }

  __device__ void load(Chunk (&chunks)[kLoads], int64_t feature) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) chunks[i] = load_one(i, feature);
  }

  __device__ static void store(char* stage, const Chunk (&chunks)[kLoads]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      *reinterpret_cast<Chunk*>(stage + place_of(vector_of(i), threadIdx.x % kChunks)) = chunks[i];
    }
  }

  __device__ static void multiply(Sums& sums, const char* stage) {
    if constexpr (sizeof(T) == 2) {
      multiply_halves(sums, stage);
    } else {
      multiply_floats(sums, stage);
    }
  }

 private:
  // Both operands lie by features: queries are `a` stored by rows, rows are `b` stored by columns.
  __device__ static void multiply_halves(Sums& sums, const char* stage) {
    const TilePlace<kCosineTile, kCosineTile> place;
    const int lane = threadIdx.x % kWarp, row = lane % 8, quarter = lane / 8;
#pragma unroll
    for (int k = 0; k < kChunks; k += 2) {  // 16 features
      uint32_t a[kM][4], b[kN / 2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int vector = place.warp_row + 16 * m + quarter % 2 * 8 + row;
        ldmatrix(a[m], stage + place_of(vector, k + quarter / 2));
      }
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        const int vector = kCosineTile + place.warp_col + 16 * n + quarter / 2 * 8 + row;
        ldmatrix(b[n], stage + place_of(vector, k + quarter % 2));
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t half[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < kM; ++m) mma_m16n8k16<T>(sums[m][n], a[m], half);
      }
    }
  }

  __device__ static void multiply_floats(Sums& sums, const char* stage) {
    const TilePlace<kCosineTile, kCosineTile> place;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Pack<float, 4> a[kM][2], b[kN][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 2; ++e) a[m][e] = read(stage, place.row(m, 2 * e), chunk);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) b[n][e] = read(stage, kCosineTile + place.col(n, e), chunk);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              sums[m][n][e] = fmaf(a[m][e / 2].v[i], b[n][e % 2].v[i], sums[m][n][e]);
            }
          }
        }
      }
    }
  }

  __device__ static Pack<float, 4> read(const char* stage, int vector, int chunk) {
    return *reinterpret_cast<const Pack<float, 4>*>(stage + place_of(vector, chunk));
  }
};

}  // namespace gradsafe
