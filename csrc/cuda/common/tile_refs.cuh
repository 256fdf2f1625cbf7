// Reference tiles in shared memory, read in the layout of a tile's sums.
#pragma once

#include "tile_product.cuh"

namespace gradsafe {

// K references of one kOut x kIn tile, kept as type S. They are loaded once and read many times.
template <class S, int K, int kOut, int kIn>
struct TileRefs {
  // One ldmatrix reads a chunk of eight rows; a read of float32 pairs two chunks of four rows.
  using Mixed = std::conditional_t<sizeof(S) == 2, Mix<8, 1>, Mix<4, 2>>;
  using Loads = TileLoads<S, kOut, kIn, Mixed>;
  static constexpr int kBytes = Loads::kBytes;  // of one reference
  static constexpr int kRowBytes = kIn * static_cast<int>(sizeof(S));

  // Starts to load one tile, of which `rows` exist. from.aligned also says that the reference is
  // stored as S; otherwise it is of type `dtype`, and from.data only has its address. S holds every
  // value of `dtype`.
  __device__ static void load(char* to, const TileColumns<S>& from, DType dtype, int64_t first,
                              int rows) {
    const Loads loads(from.count);
    if (from.aligned) return loads.start(to, from, first, rows);
    loads.copy(to, rows, [&](int row, int col) {
      const int64_t at = (first + row) * from.stride + from.first + col;
      if (dtype == DType::f8) {
        return narrow<S>(widen(reinterpret_cast<const f8*>(from.data)[at]));
      }
      if constexpr (sizeof(S) == 2) {
        return from.data[at];
      } else {
        if (dtype == DType::f32) return from.data[at];
        const uint16_t bits = reinterpret_cast<const uint16_t*>(from.data)[at];
        return dtype == DType::bf16 ? widen(bf16{bits}) : widen(f16{bits});
      }
    });
  }

  // Of two fragments, (m, n) and (m, n + 1) for n even: [reference][4 * fragment + element].
  using Values = float[K > 0 ? K : 1][8];
  __device__ static void read(const char* refs, int m, int n, Values& r) {
    const TilePlace<kOut, kIn> place;
    if constexpr (K > 0 && sizeof(S) == 2) {
      // ldmatrix deals out rows of 16-bit elements just as mma lays out its sums.
      const int lane = threadIdx.x % kWarp, row = lane % 8, quarter = lane / 8;
      const int chunk = (place.warp_col / 8 + quarter / 2) ^ Mixed::of(row);
      const char* from = refs + (place.warp_row + quarter % 2 * 8 + row) * kRowBytes +
                         (chunk ^ n) * kChunkBytes;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        uint32_t words[4];
        ldmatrix(words, from + k * kBytes + m * (16 * kRowBytes));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[k][2 * i] = widen(S{static_cast<uint16_t>(words[i])});
          r[k][2 * i + 1] = widen(S{static_cast<uint16_t>(words[i] >> 16)});
        }
      }
    } else if constexpr (K > 0) {
      const int chunk = (place.col(0, 0) / 4) ^ Mixed::of(place.row(0, 0));
      const char* from = refs + place.row(0, 0) * kRowBytes + place.t % 2 * 8;
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // fragment n + i / 2, rows g + 8 (i % 2)
          const float2 two = *reinterpret_cast<const float2*>(
              from + k * kBytes + (16 * m + 8 * (i % 2)) * kRowBytes +
              (chunk ^ 2 * (n + i / 2)) * kChunkBytes);
          r[k][2 * i] = two.x;
          r[k][2 * i + 1] = two.y;
        }
      }
    }
  }
};

}  // namespace gradsafe
